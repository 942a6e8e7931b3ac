// Runs updates without Python and XLA, so that sanitizers see nothing but them.
//
//   driver < updates > results   each update with every instruction set, on several
//                                    pools; all must agree bit for bit
//   driver large                 updates of tables of 2**32 weights by as many numbers
//
// An update is its header, then the arrays of the state, grads, ids, sources, gains and
// seeds, one for each array; a result is the state. Exits with 1 if a promise is broken.

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "pools.h"
#include "update.h"

namespace {

using namespace sparse_adam;
using Bytes = std::vector<char>;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

struct Header {
  char rule[32];
  int64_t num_rows, dim, num_ids, num_grads;
  int64_t rows_per_group, stride, group_stride;
  int64_t num_arrays, num_constants;
  int64_t narrow_grads, weighted, stochastic, lazy, accumulate, decays;
  int64_t first[kMostArrays], encodings[kMostArrays], per_row[kMostArrays];
  int64_t bytes[kMostArrays];  // of the arrays; 0: it is in the first one too
  float numbers[3], bounds[4], ema_share, constants[8];
};

Bytes Read(int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, stdin) != bytes.size()) Fail("short input");
  return bytes;
}

struct Arrays {
  Bytes state[kMostArrays], grads, ids, sources, gains, seeds;
};

template <typename Item>
const Item* OrNull(const Bytes& bytes) {
  return bytes.empty() ? nullptr : reinterpret_cast<const Item*>(bytes.data());
}

Update UpdateOf(const Header& h, Arrays& arrays) {
  Update update = {};
  Storage& state = update.state;
  state.rows_per_group = h.rows_per_group;
  state.stride = h.stride;
  state.group_stride = h.group_stride;
  int seed = 0;
  for (int i = 0; i < h.num_arrays; ++i) {
    const auto encoding = static_cast<Encoding>(h.encodings[i]);
    Bytes& bytes = arrays.state[h.bytes[i] == 0 ? 0 : i];
    const Matrix whole = {bytes.data(), encoding};
    char* first = whole.At(h.first[i]);
    if (h.per_row[i]) {
      state.row_arrays[state.num_row_arrays++] = reinterpret_cast<float*>(first);
      continue;
    }
    state.arrays[state.num_arrays++] = {first, encoding};
    if (h.stochastic) {
      const auto* seeds = reinterpret_cast<const int32_t*>(arrays.seeds.data());
      update.seeds[seed++] = seeds[i];
    }
  }
  update.grads = {arrays.grads.data(),
                  h.narrow_grads ? Encoding::kBFloat16 : Encoding::kFloat32};
  update.ids = reinterpret_cast<const int32_t*>(arrays.ids.data());
  update.sources = reinterpret_cast<const int32_t*>(arrays.sources.data());
  update.gains = OrNull<float>(arrays.gains);
  update.stochastic = h.stochastic != 0;
  update.num_rows = h.num_rows;
  update.dim = h.dim;
  update.num_ids = h.num_ids;
  update.num_grads = h.num_grads;
  update.lazy = h.lazy != 0;
  update.accumulate = h.accumulate != 0;
  const RegisteredRule* rule = RegisteredRule::Find(h.rule);
  if (rule == nullptr || rule->num_constants() != h.num_constants) Fail("no such rule");
  update.rule = &rule->LoopsFor(h.constants);
  update.prepared = update.rule->prepare(h.constants, h.numbers[0]);
  update.numbers = {h.decays != 0, h.numbers[1], h.numbers[2], h.bounds[0],
                    h.bounds[1],   h.bounds[2],  h.bounds[3],  h.ema_share, 0};
  return update;
}

void RunUpdate(const Header& header) {
  Arrays given;
  for (int i = 0; i < header.num_arrays; ++i) given.state[i] = Read(header.bytes[i]);
  given.grads = Read(header.num_grads * header.dim * (header.narrow_grads ? 2 : 4));
  given.ids = Read(header.num_ids * 4);
  given.sources = Read(header.num_ids * 4);
  given.gains = Read(header.weighted ? header.num_ids * 4 : 0);
  given.seeds = Read(header.stochastic ? header.num_arrays * 4 : 0);
  const auto pools = EveryPool();
  Arrays first;
  for (int i = 0; const Loops* loops = LoopsAt(i); ++i) {
    for (const auto& pool : pools) {
      Arrays arrays = given;
      Run(UpdateOf(header, arrays), *pool, *loops);
      if (first.state[0].empty()) first = arrays;
      for (int k = 0; k < kMostArrays; ++k) {
        if (arrays.state[k] != first.state[k]) Fail("threads or loops change a result");
      }
    }
  }
  for (const Bytes& bytes : first.state) {
    if (!bytes.empty()) std::fwrite(bytes.data(), 1, bytes.size(), stdout);
  }
}

// Pages that nobody touches take no memory.
float* Reserve(int64_t size) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* pages = mmap(nullptr, size * 4, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (pages == MAP_FAILED) Fail("no address space");
  return static_cast<float*>(pages);
}

void RunLarge(bool accumulate, bool packed) {
  constexpr int64_t kDim = 256, kRows = (int64_t{1} << 32) / kDim;
  const std::vector<int32_t> ids = {kRows - 1, 5, kRows / 2, kRows - 1, -1, kRows};
  // One gradient for all, the last one of as many.
  const std::vector<int32_t> sources(ids.size(), kRows - 1);
  float* const gradients = Reserve(kRows * kDim);
  std::fill_n(gradients + (kRows - 1) * kDim, kDim, 2.0f);
  float* const memory = Reserve(3 * kRows * kDim);
  // Packed, the three rows stand together.
  const int64_t row_stride = packed ? 3 * kDim : kDim;
  const int64_t array_stride = packed ? kDim : kRows * kDim;
  const auto at = [&](int array, int64_t row) {
    return memory + array * array_stride + row * row_stride;
  };
  Update update = {};
  for (int i = 0; i < 3; ++i) {
    update.state.arrays[i] = {reinterpret_cast<char*>(at(i, 0)), Encoding::kFloat32};
  }
  update.state.num_arrays = 3;
  update.state.rows_per_group = packed ? 1 : kRows;
  update.state.stride = kDim;
  update.state.group_stride = packed ? row_stride : 0;
  update.grads = {reinterpret_cast<char*>(gradients), Encoding::kFloat32};
  update.ids = ids.data();
  update.sources = sources.data();
  update.num_rows = kRows;
  update.dim = kDim;
  update.num_ids = ids.size();
  update.num_grads = kRows;
  update.lazy = true;
  update.accumulate = accumulate;
  // With betas of 0, m is the gradient, v its square, and a step 1.
  const float constants[] = {0, 0, 1e-7f, 1, 0, 0, 1, 0};
  update.rule = &RegisteredRule::Find("AdamRule")->LoopsFor(constants);
  update.prepared = update.rule->prepare(constants, 1);
  update.numbers = {false, 0, 1, -1e9f, 1e9f, -1e9f, 1e9f, 0};
  Threads pool(2);
  Run(update, pool);
  for (const int64_t row : {int64_t{5}, kRows / 2, kRows - 1}) {
    const bool twice = row == kRows - 1;
    const float m = twice && accumulate ? 4 : 2, w = twice && !accumulate ? -2 : -1;
    for (int64_t i = 0; i < kDim; ++i) {
      const bool right =
          at(0, row)[i] == w && at(1, row)[i] == m && at(2, row)[i] == m * m;
      if (!right) Fail("a row far away is wrong");
    }
  }
  for (const int64_t row : {int64_t{0}, int64_t{4}, int64_t{6}, kRows - 2}) {
    if (*at(0, row) != 0) Fail("a row that was not looked up has changed");
  }
  munmap(gradients, kRows * kDim * 4);
  munmap(memory, 3 * kRows * kDim * 4);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "large") == 0) {
    for (bool accumulate : {false, true}) {
      for (bool packed : {false, true}) RunLarge(accumulate, packed);
    }
    return 0;
  }
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) RunUpdate(header);
  return 0;
}
