// A least-significant-digit radix sort on only the bits that a row number needs.
//
// The batch is cut into parts of consecutive occurrences. In each pass every part
// counts its digits, then knows where its occurrences go, then puts them there: the
// result of a stable sort is unique, so it does not depend on the parts.

#include "sort.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace sparse_adam {
namespace {

constexpr int kMaxDigitBits = 11;  // counters of one part fit in the first-level cache
constexpr int64_t kMaxParts = 16;
constexpr int64_t kMinPartSize = 8192 / kFineness;

struct Parts {
  int64_t size, count;
  int64_t begin(int64_t part) const { return size * part / count; }
};

int BitsToHold(uint32_t largest) {
  int bits = 0;
  for (; largest != 0; largest >>= 1) ++bits;
  return bits;
}

// Writes the valid occurrences to `kept`; returns how many. `ascending` tells whether
// they are sorted already.
int64_t KeepValid(const int32_t* ids, uint32_t num_rows, const Parts& parts, Pool& pool,
                  Occurrence* kept, bool* ascending) {
  std::atomic<bool> in_order{true};
  std::vector<int64_t> first(parts.count + 1, 0);
  ParallelFor(pool, parts.count, parts.count, [&](int64_t, int64_t part) {
    const int64_t begin = parts.begin(part), end = parts.begin(part + 1);
    int64_t valid = 0, descents = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t id = ids[i];  // a negative one becomes large
      const uint32_t before = ids[std::max<int64_t>(i - 1, 0)];
      valid += id < num_rows;
      descents += id < before;
    }
    first[part + 1] = valid;
    if (descents != 0) in_order.store(false, std::memory_order_relaxed);
  });
  for (int64_t part = 0; part < parts.count; ++part) first[part + 1] += first[part];
  ParallelFor(pool, parts.count, parts.count, [&](int64_t, int64_t part) {
    Occurrence* to = kept + first[part];
    for (int64_t i = parts.begin(part); i < parts.begin(part + 1); ++i) {
      const uint32_t id = ids[i];
      if (id < num_rows) *to++ = {id, static_cast<uint32_t>(i)};
    }
  });
  *ascending = in_order.load();
  return first[parts.count];
}

// One pass: sorts by `bits` bits of the row, from bit `shift` on.
void SortByDigit(const Occurrence* from, Occurrence* to, int shift, int bits,
                 const Parts& parts, Pool& pool, std::vector<uint32_t>& counters) {
  const int64_t digits = int64_t{1} << bits;
  const auto digit = [=](const Occurrence& x) { return x.row >> shift & (digits - 1); };
  ParallelFor(pool, parts.count, parts.count, [&](int64_t, int64_t part) {
    uint32_t* count = &counters[part * digits];
    std::fill_n(count, digits, 0);
    for (int64_t i = parts.begin(part); i < parts.begin(part + 1); ++i) {
      ++count[digit(from[i])];
    }
  });
  uint32_t place = 0;
  for (int64_t d = 0; d < digits; ++d) {
    for (int64_t part = 0; part < parts.count; ++part) {
      uint32_t& counter = counters[part * digits + d];
      const uint32_t count = counter;
      counter = place;
      place += count;
    }
  }
  ParallelFor(pool, parts.count, parts.count, [&](int64_t, int64_t part) {
    uint32_t* next = &counters[part * digits];
    for (int64_t i = parts.begin(part); i < parts.begin(part + 1); ++i) {
      to[next[digit(from[i])]++] = from[i];
    }
  });
}

Parts Split(int64_t size, const Pool& pool) {
  const int64_t most = std::min(std::max<int64_t>(1, pool.num_threads()), kMaxParts);
  return {size, std::clamp<int64_t>(size / kMinPartSize, 1, most)};
}

}  // namespace

SortedOccurrences::SortedOccurrences(const int32_t* ids, int64_t num_ids,
                                     int64_t num_rows, Pool& pool) {
  for (auto& buffer : buffers_) buffer.reset(new Occurrence[num_ids]);
  Occurrence *from = buffers_[0].get(), *to = buffers_[1].get();
  bool ascending;
  const uint32_t rows = static_cast<uint32_t>(num_rows);
  size_ = KeepValid(ids, rows, Split(num_ids, pool), pool, from, &ascending);
  sorted_ = from;
  const int bits = BitsToHold(rows - 1);
  if (ascending || bits == 0) return;
  const int passes = (bits + kMaxDigitBits - 1) / kMaxDigitBits;
  const int digit_bits = (bits + passes - 1) / passes;
  const Parts parts = Split(size_, pool);
  std::vector<uint32_t> counters(parts.count << digit_bits);
  for (int pass = 0; pass < passes; ++pass) {
    SortByDigit(from, to, pass * digit_bits, digit_bits, parts, pool, counters);
    std::swap(from, to);
  }
  sorted_ = from;
}

}  // namespace sparse_adam
