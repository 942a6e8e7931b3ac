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
#include "xla/ffi/api/ffi.h"

// A name that the library shows.
#define SHOWN extern "C" __attribute__((visibility("default")))

namespace sparse_adam {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

class XlaPool : public Pool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void Schedule(std::function<void()> task) override {
    pool_.Schedule(std::move(task));
  }

 private:
  xla::ffi::ThreadPool pool_;
};

inline xla::ffi::Error Refuse(const std::string& what) {
  return xla::ffi::Error::InvalidArgument("sparse_adam on a CPU: " + what);
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
  try {
    Run(call, pool);
  } catch (const std::bad_alloc&) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                           "sparse_adam on a CPU: no memory to sort the ids");
  }
  return xla::ffi::Error::Success();
}

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_XLA_H_
