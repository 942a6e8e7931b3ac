// Runs parallel loops many times, and insists that each part is run once, that a worker
// has one part at a time, and that all parts are done when the loop returns.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "parallel.h"
#include "pools.h"

namespace {

using namespace sparse_adam;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void RunLoop(Pool& pool, int64_t workers, int64_t parts) {
  // Shared with the body, which might be called too late.
  const auto runs = std::make_shared<std::vector<std::atomic<int>>>(parts);
  const auto busy = std::make_shared<std::vector<std::atomic<int>>>(workers);
  ParallelFor(pool, workers, parts, [runs, busy, workers](int64_t worker, int64_t part) {
    if (worker < 0 || worker >= workers) Fail("there is no such worker");
    if ((*busy)[worker].fetch_add(1) != 0) Fail("a worker has two parts at a time");
    if (part % 4 == 0) std::this_thread::yield();
    (*runs)[part].fetch_add(1);
    (*busy)[worker].fetch_sub(1);
  });
  for (const auto& count : *runs) {
    if (count.load() != 1) Fail("a part was not run once");
  }
}

}  // namespace

int main() {
  for (const auto& pool : EveryPool()) {
    for (int64_t parts : {0, 1, 2, 3, 7, 64, 1000}) {
      for (int64_t workers : {1, 2, 4, 8}) {
        for (int again = 0; again < 50; ++again) RunLoop(*pool, workers, parts);
      }
    }
  }
  return 0;
}
