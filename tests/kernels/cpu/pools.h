// Thread pools for the drivers: of threads, late ones, and none.

#ifndef SPARSE_ADAM_TESTS_POOLS_H_
#define SPARSE_ADAM_TESTS_POOLS_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel.h"

namespace sparse_adam {

using Task = std::function<void()>;

// Threads that take what is scheduled, as soon as they can.
class Threads : public Pool {
 public:
  explicit Threads(int count) : count_(count) {
    for (int i = 1; i < count; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Threads() override {
    for (size_t i = 0; i < threads_.size(); ++i) Schedule(nullptr);
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const override { return count_; }
  void Schedule(Task task) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    some_.notify_one();
  }

 private:
  Task Take() {
    std::unique_lock<std::mutex> lock(mutex_);
    some_.wait(lock, [this] { return !tasks_.empty(); });
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    return task;
  }
  void Work() {
    while (const Task task = Take()) task();
  }

  const int count_;
  std::mutex mutex_;
  std::condition_variable some_;
  std::deque<Task> tasks_;
  std::vector<std::thread> threads_;
};

// A pool so busy that it comes to its tasks when the caller has long gone.
class LatePool : public Pool {
 public:
  ~LatePool() override {
    for (const Task& task : tasks_) task();
  }
  int64_t num_threads() const override { return 4; }
  void Schedule(Task task) override { tasks_.push_back(std::move(task)); }

 private:
  std::vector<Task> tasks_;
};

// What XLA's pool does when it cannot schedule.
class CallersThread : public Pool {
 public:
  int64_t num_threads() const override { return 4; }
  void Schedule(Task task) override { task(); }
};

inline std::vector<std::unique_ptr<Pool>> EveryPool() {
  std::vector<std::unique_ptr<Pool>> pools;
  for (int count : {1, 2, 3, 8}) pools.push_back(std::make_unique<Threads>(count));
  pools.push_back(std::make_unique<LatePool>());
  pools.push_back(std::make_unique<CallersThread>());
  return pools;
}

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_TESTS_POOLS_H_
