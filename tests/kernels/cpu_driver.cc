// Runs updates without Python and XLA, so that sanitizers see nothing but them.
//
//   cpu_driver < updates > results   each update with every instruction set, on several
//                                    pools; all must agree bit for bit
//   cpu_driver large                 one update of tables of 2**32 weights
//
// An update is its header, then table, momenta, velocities, grads, ids, sources and
// gains; a result is the three tables. Exits with 1 if a promise is broken.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "update.h"

namespace {

using sparse_adam::Formula;
using sparse_adam::Loops;
using sparse_adam::LoopsAt;
using sparse_adam::Matrix;
using sparse_adam::Pool;
using sparse_adam::Run;
using sparse_adam::Update;
using Task = std::function<void()>;
using Bytes = std::vector<char>;

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

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

struct Header {
  int64_t num_rows, dim, num_ids, num_grads;
  int64_t bfloat16[4];  // table, momenta, velocities, grads
  int64_t weighted, lazy, accumulate, sum_inside_sqrt;
  float rate, beta_1, beta_2, epsilon, decay;
  float gradient_min, gradient_max, weight_min, weight_max, unused;
};

Bytes Read(int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, stdin) != bytes.size()) Fail("short input");
  return bytes;
}

struct Arrays {
  Bytes state[3], grads, ids, sources, gains;
};

Bytes ReadMatrix(const Header& header, int i, int64_t rows) {
  return Read(rows * header.dim * (header.bfloat16[i] ? 2 : 4));
}

Update UpdateOf(const Header& h, Arrays& arrays) {
  const auto matrix = [&](int i, Bytes& bytes) {
    return Matrix{bytes.data(), h.bfloat16[i] != 0};
  };
  const auto* gains = reinterpret_cast<const float*>(arrays.gains.data());
  const Formula formula = {h.rate,         h.beta_1,       h.beta_2,
                           h.epsilon,      h.decay,        h.sum_inside_sqrt != 0,
                           h.gradient_min, h.gradient_max, h.weight_min,
                           h.weight_max};
  return {matrix(0, arrays.state[0]),
          matrix(1, arrays.state[1]),
          matrix(2, arrays.state[2]),
          matrix(3, arrays.grads),
          reinterpret_cast<const int32_t*>(arrays.ids.data()),
          reinterpret_cast<const int32_t*>(arrays.sources.data()),
          h.weighted ? gains : nullptr,
          h.num_rows,
          h.dim,
          h.num_ids,
          h.num_grads,
          h.lazy != 0,
          h.accumulate != 0,
          formula};
}

std::vector<std::unique_ptr<Pool>> Pools() {
  std::vector<std::unique_ptr<Pool>> pools;
  for (int count : {1, 2, 3, 8}) pools.push_back(std::make_unique<Threads>(count));
  pools.push_back(std::make_unique<LatePool>());
  pools.push_back(std::make_unique<CallersThread>());
  return pools;
}

void RunUpdate(const Header& header) {
  Arrays given;
  for (int i = 0; i < 3; ++i) given.state[i] = ReadMatrix(header, i, header.num_rows);
  given.grads = ReadMatrix(header, 3, header.num_grads);
  given.ids = Read(header.num_ids * 4);
  given.sources = Read(header.num_ids * 4);
  given.gains = Read(header.weighted ? header.num_ids * 4 : 0);
  const auto pools = Pools();
  Arrays first;
  for (int i = 0; const Loops* loops = LoopsAt(i); ++i) {
    for (const auto& pool : pools) {
      Arrays arrays = given;
      Run(UpdateOf(header, arrays), *pool, *loops);
      if (first.state[0].empty()) first = arrays;
      for (int k = 0; k < 3; ++k) {
        if (arrays.state[k] != first.state[k]) Fail("threads or loops change a result");
      }
    }
  }
  for (const Bytes& bytes : first.state) {
    std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
}

// Pages that nobody touches take no memory.
float* Reserve(int64_t size) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* pages = mmap(nullptr, size * 4, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (pages == MAP_FAILED) Fail("no address space");
  return static_cast<float*>(pages);
}

void RunLarge(bool accumulate) {
  constexpr int64_t kDim = 256, kRows = (int64_t{1} << 32) / kDim;
  const std::vector<int32_t> ids = {kRows - 1, 5, kRows / 2, kRows - 1, -1, kRows};
  const std::vector<int32_t> sources(ids.size(), 0);
  std::vector<float> gradient(kDim, 2);
  float* state[3];
  for (float*& x : state) x = Reserve(kRows * kDim);
  // With betas of 0, m is the gradient, v its square, and a step 1.
  const Formula formula = {1, 0, 0, 1e-7f, 0, true, -1e9f, 1e9f, -1e9f, 1e9f};
  const Update update = {{state[0], false},        {state[1], false}, {state[2], false},
                         {gradient.data(), false}, ids.data(),        sources.data(),
                         nullptr,                  kRows,             kDim,
                         int64_t(ids.size()),      1,                 true,
                         accumulate,               formula};
  Threads pool(2);
  Run(update, pool);
  for (const int64_t row : {int64_t{5}, kRows / 2, kRows - 1}) {
    const bool twice = row == kRows - 1;
    const float m = twice && accumulate ? 4 : 2, w = twice && !accumulate ? -2 : -1;
    for (int64_t i = row * kDim; i < (row + 1) * kDim; ++i) {
      const bool right = state[0][i] == w && state[1][i] == m && state[2][i] == m * m;
      if (!right) Fail("a row far away is wrong");
    }
  }
  for (const int64_t row : {int64_t{0}, int64_t{4}, int64_t{6}, kRows - 2}) {
    if (state[0][row * kDim] != 0) Fail("a row that was not looked up has changed");
  }
  for (float* x : state) munmap(x, kRows * kDim * 4);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "large") == 0) {
    for (bool accumulate : {false, true}) RunLarge(accumulate);
    return 0;
  }
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) RunUpdate(header);
  return 0;
}
