// Runs lookups without Python and XLA, so that sanitizers see nothing but them.
//
//   lookup_driver < calls > results   each call with every instruction set, on several
//                                         pools; all must agree bit for bit
//   lookup_driver large               lookups in a table of 2**32 weights
//
// A call is its header, then the table, ids, samples, gains and scales; a result is the
// rows. Every array stands in memory of its own, so that a sanitizer sees a read beyond
// it. Exits with 1 if a promise is broken.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lookup.h"
#include "pools.h"

namespace {

using namespace sparse_adam;
using Bytes = std::vector<char>;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

struct Header {
  int64_t bytes, num_rows, dim;  // of the table
  int64_t first, encoding, rows_per_group, stride, group_stride;
  int64_t num_ids, num_samples;
  int64_t combined, narrow, sampled, weighted, scaled;  // 0 or 1
};

Bytes Read(int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, stdin) != bytes.size()) Fail("short input");
  return bytes;
}

template <typename Item>
const Item* OrNull(const Bytes& bytes, bool given) {
  return given ? reinterpret_cast<const Item*>(bytes.data()) : nullptr;
}

void RunCall(const Header& h) {
  const Bytes table = Read(h.bytes), ids = Read(h.num_ids * 4);
  const Bytes samples = Read(h.sampled ? h.num_ids * 4 : 0);
  const Bytes gains = Read(h.weighted ? h.num_ids * 4 : 0);
  const Bytes scales = Read(h.scaled ? h.num_samples * 4 : 0);
  const auto encoding = static_cast<Encoding>(h.encoding);
  const Weights weights = {{h.rows_per_group, h.stride, h.group_stride},
                           table.data() + h.first * ItemSize(encoding),
                           encoding,
                           h.num_rows,
                           h.dim};
  if ((h.first + weights.End(h.num_rows, h.dim)) * ItemSize(encoding) > h.bytes) Fail("a small table");
  const Encoding narrow = h.narrow ? Encoding::kBFloat16 : Encoding::kFloat32;
  const int64_t rows = h.combined ? h.num_samples : h.num_ids;
  const auto pools = EveryPool();
  Bytes first;
  for (int i = 0; const Loops* loops = LoopsAt(i); ++i) {
    for (const auto& pool : pools) {
      Bytes out(rows * h.dim * ItemSize(narrow), 0x55);
      if (h.combined) {
        Combine combine = {};
        combine.weights = weights;
        combine.ids = OrNull<int32_t>(ids, true);
        combine.samples = OrNull<int32_t>(samples, h.sampled);
        combine.gains = OrNull<float>(gains, h.weighted);
        combine.scales = OrNull<float>(scales, h.scaled);
        combine.num_ids = h.num_ids;
        combine.places = h.num_samples == 0 ? 0 : h.num_ids / h.num_samples;
        combine.num_samples = h.num_samples;
        combine.out = out.data();
        combine.encoding = narrow;
        Run(combine, *pool, *loops);
      } else {
        Run(Lookup{weights, OrNull<int32_t>(ids, true), h.num_ids, out.data(), narrow},
            *pool, *loops);
      }
      if (first.empty()) first = out;
      if (out != first) Fail("threads or loops change a result");
    }
  }
  if (!first.empty()) std::fwrite(first.data(), 1, first.size(), stdout);
}

void RunLarge(bool packed) {
  constexpr int64_t kDim = 256, kRows = (int64_t{1} << 32) / kDim;
  const int64_t stride = packed ? 3 * kDim : kDim, size = kRows * stride * 4;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  // Pages that nobody writes take no memory.
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (pages == MAP_FAILED) Fail("no address space");
  auto* const memory = static_cast<float*>(pages);
  const std::vector<int32_t> ids = {kRows - 1, 5, kRows / 2, kRows - 1, -1, kRows};
  for (const int32_t id : ids) {
    if (id >= 0 && id < kRows) memory[id * stride + kDim - 1] = static_cast<float>(id);
  }
  const int64_t rows_per_group = packed ? 1 : kRows, group_stride = packed ? stride : 0;
  const Weights weights = {{rows_per_group, stride, group_stride},
                           static_cast<char*>(pages),
                           Encoding::kFloat32,
                           kRows,
                           kDim};
  Threads pool(2);
  std::vector<float> rows(ids.size() * kDim), sums(2 * kDim);
  char* const out = reinterpret_cast<char*>(rows.data());
  Run(Lookup{weights, ids.data(), 6, out, Encoding::kFloat32}, pool);
  for (size_t i = 0; i < ids.size(); ++i) {
    const float last = i < 4 ? static_cast<float>(ids[i]) : 0;
    if (rows[(i + 1) * kDim - 1] != last) Fail("a row far away is wrong");
  }
  Combine combine = {};
  combine.weights = weights;
  combine.ids = ids.data();
  combine.num_ids = 6;
  combine.places = 3;
  combine.num_samples = 2;
  combine.out = reinterpret_cast<char*>(sums.data());
  combine.encoding = Encoding::kFloat32;
  Run(combine, pool);
  const float last = static_cast<float>(kRows - 1) + 5 + static_cast<float>(kRows / 2);
  if (sums[kDim - 1] != last) Fail("a sum of rows far away is wrong");
  if (sums[2 * kDim - 1] != static_cast<float>(kRows - 1)) Fail("a wild id is added");
  munmap(pages, size);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "large") == 0) {
    for (bool packed : {false, true}) RunLarge(packed);
    return 0;
  }
  Header header;
  while (std::fread(&header, sizeof(header), 1, stdin) == 1) RunCall(header);
  return 0;
}
