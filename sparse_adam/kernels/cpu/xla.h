// What the handlers of XLA's custom calls share.

#ifndef SPARSE_ADAM_XLA_H_
#define SPARSE_ADAM_XLA_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "parallel.h"
#include "storage.h"
#include "xla/ffi/api/ffi.h"

#if defined(__SANITIZE_THREAD__)
#include <mutex>
#include <thread>
#endif

// A name that the library shows.
#define SHOWN extern "C" __attribute__((visibility("default")))

namespace sparse_adam {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

class XlaPool : public Pool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
#if defined(__SANITIZE_THREAD__)
  // The sanitizer does not see how XLA, which it did not compile, hands over a task.
  void Schedule(std::function<void()> task) override {
    std::thread(std::move(task)).detach();
  }
#else
  void Schedule(std::function<void()> task) override {
    pool_.Schedule(std::move(task));
  }
#endif

 private:
  xla::ffi::ThreadPool pool_;
};

inline xla::ffi::Error Refuse(const std::string& what) {
  return xla::ffi::Error::InvalidArgument("sparse_adam on a CPU: " + what);
}

// An attribute or a size, and what it must be.
inline xla::ffi::Error RefuseNumber(const char* name, int64_t value,
                                    const std::string& what) {
  return Refuse(name + ("=" + std::to_string(value)) + " must be " + what);
}

// Whether rows 0 to num_rows - 1 can stand so, and none in another. All numbers are
// below 2**31, so no sum of two products overflows.
inline xla::ffi::Error CheckGroups(const Groups& groups, int64_t num_rows,
                                   int64_t dim) {
  if (num_rows < 1) return RefuseNumber("num_rows", num_rows, "at least 1");
  if (groups.rows_per_group < 1) {
    return RefuseNumber("rows_per_group", groups.rows_per_group, "at least 1");
  }
  if (dim < 1 || dim > kMost) return RefuseNumber("D", dim, "in [1, 2**31)");
  const int64_t stride = num_rows > 1 && groups.rows_per_group > 1 ? dim : 0;
  if (groups.stride < stride) {
    return RefuseNumber("stride", groups.stride,
                        "at least " + std::to_string(stride) + ", or rows overlap");
  }
  const int64_t size = num_rows > groups.rows_per_group ? groups.Size(num_rows, dim) : 0;
  if (groups.group_stride < size) {
    return RefuseNumber("group_stride", groups.group_stride,
                        "at least " + std::to_string(size) + ", or groups overlap");
  }
  return xla::ffi::Error::Success();
}

// A buffer of as many numbers as there should be, or null if it is empty.
template <typename Buffer>
auto OrNull(const Buffer& x) {
  return x.element_count() == 0 ? nullptr : x.typed_data();
}

// Runs a call on XLA's threads. What it allocates is room to put the ids in order.
template <typename Call>
xla::ffi::Error RunOnXla(const Call& call, xla::ffi::ThreadPool thread_pool) {
  XlaPool pool(thread_pool);
#if defined(__SANITIZE_THREAD__)
  // Nor that a call which has returned came before this one.
  static std::mutex returned;
  { const std::lock_guard<std::mutex> after(returned); }
#endif
  try {
    Run(call, pool);
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                           "sparse_adam on a CPU: no memory to sort the ids");
  }
#if defined(__SANITIZE_THREAD__)
  { const std::lock_guard<std::mutex> before(returned); }
#endif
  return xla::ffi::Error::Success();
}

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_XLA_H_
