// A parallel loop on someone else's thread pool.

#ifndef SPARSE_ADAM_PARALLEL_H_
#define SPARSE_ADAM_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

namespace sparse_adam {

// A thread pool. It runs what it is given at some time, perhaps after the call that
// scheduled it has returned, perhaps on the calling thread.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t num_threads() const = 0;
  virtual void Schedule(std::function<void()> task) = 0;
};

// How many times as finely as pays work is cut. Only tests set it, so that a small case
// has as many parts and threads as a large one.
#ifndef SPARSE_ADAM_FINENESS
#define SPARSE_ADAM_FINENESS 1
#endif
constexpr int64_t kFineness = SPARSE_ADAM_FINENESS;

// Work as cheap as this many bytes of traffic is not worth waking a thread for.
constexpr int64_t kBytesPerWorker = (512 << 10) / kFineness;

// How many threads, the calling one included, should share `bytes` of traffic.
inline int64_t WorkersFor(int64_t bytes, const Pool& pool) {
  const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerWorker);
  return std::min(useful, std::max<int64_t>(1, pool.num_threads()));
}

namespace internal {

// The processor that the calling thread runs on; -1 where that cannot be known.
inline int CurrentProcessor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves the calling thread to another processor, if it runs on this one and may run
// elsewhere.
//
// On a virtual machine Linux takes a processor that sleeps for one that the host has
// taken away, and wakes a helper on the processor of its caller: there both would take
// turns, until the load is balanced some milliseconds later.
inline void LeaveProcessor(int processor) {
#if defined(__linux__)
  if (processor < 0 || sched_getcpu() != processor) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0) return;
  // It stays there when it may run everywhere again.
  if (sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
#else
  (void)processor;
#endif
}

struct Loop {
  Loop(int64_t parts, int64_t grain, std::function<void(int64_t, int64_t)> body)
      : parts(parts), grain(grain), body(std::move(body)) {}

  // Takes parts until none is left. Does not touch the body unless it got one.
  void Work(int64_t worker) {
    int64_t finished = 0;
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= parts) break;
      const int64_t end = std::min(begin + grain, parts);
      for (int64_t part = begin; part < end; ++part) body(worker, part);
      finished += end - begin;
    }
    if (finished == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    done += finished;
    if (done == parts) all_done.notify_one();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == parts; });
  }

  const int64_t parts;
  const int64_t grain;
  const std::function<void(int64_t, int64_t)> body;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;  // guarded by the mutex
};

}  // namespace internal

// Calls body(worker, part) once for each part in [0, parts), on at most `workers`
// threads, numbered from 0, and returns when all calls have. Which worker gets a part
// is left to chance.
//
// The calling thread works too and waits only for parts that somebody has begun, so
// nothing is stuck if the pool is busy, even with callers of this function. A helper
// that comes too late finds no part left; it shares the ownership of the loop, and so
// touches nothing of a caller that has gone.
template <typename Body>
void ParallelFor(Pool& pool, int64_t workers, int64_t parts, const Body& body) {
  workers = std::min(workers, parts);
  if (workers <= 1) {
    for (int64_t part = 0; part < parts; ++part) body(0, part);
    return;
  }
  // Eight turns each: enough to balance, few enough not to fight for the counter.
  const int64_t grain = std::max<int64_t>(1, parts / (8 * workers));
  const auto loop = std::make_shared<internal::Loop>(parts, grain, std::cref(body));
  const int processor = internal::CurrentProcessor();
  const std::thread::id caller = std::this_thread::get_id();
  try {
    for (int64_t worker = 1; worker < workers; ++worker) {
      pool.Schedule([loop, worker, processor, caller] {
        // A pool may run a task on the thread that schedules it.
        if (std::this_thread::get_id() != caller) internal::LeaveProcessor(processor);
        loop->Work(worker);
      });
    }
  } catch (const std::bad_alloc&) {
    // Fewer helpers will do.
  }
  loop->Work(0);
  loop->Wait();
}

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_PARALLEL_H_
