// Sorted occurrences are cut into blocks of equal size, whatever the ids and whoever
// runs them: so a hot row is shared, and the order of all additions depends on the
// batch only. Three passes, each parallel:
//
//   1. Each block sums its runs of equal ids and steps the rows of those that lie
//      within it. Of a run that it shares with other blocks it keeps a partial sum:
//      `head` of one that began before it, `tail` of one that begins in it and goes on.
//   2. The block where such a run begins adds up tail and heads, and steps the row.
//   3. With lazy = false: rows without an occurrence are stepped, in blocks of rows.
//
// Without accumulation, passes 1 and 2 are one: the block where a run begins makes all
// of its steps, in order.

#include "update.h"

#include <algorithm>
#include <memory>

#include "sort.h"

namespace sparse_adam {
namespace {

constexpr int64_t kBlock = 128;             // occurrences
constexpr int64_t kSweepBlock = 1 << 16;    // weights, about
constexpr int64_t kSweepPiece = 1024;       // weights that pass the buffers at a time
constexpr int64_t kCacheLine = 64;          // bytes
constexpr int64_t kLinesAhead = 256;        // lines that may be under way
constexpr int64_t kMostLinesOfRow = 16;     // the processor sees the others coming
constexpr int64_t kLeastAhead = 2, kMostAhead = 32;  // occurrences

int64_t ItemSize(const Matrix& x) { return x.is_bfloat16 ? 2 : 4; }

char* At(const Matrix& x, int64_t element) {
  return static_cast<char*>(x.data) + element * ItemSize(x);
}

int64_t LinesOfRow(const Matrix& x, int64_t dim) {
  return (dim * ItemSize(x) + kCacheLine - 1) / kCacheLine;
}

// Float32 scratch of one worker.
struct Buffers {
  float *sum, *w, *m, *v;
};

class Updater {
 public:
  Updater(const Update& update, Pool& pool, const Loops& loops)
      : u_(update),
        pool_(pool),
        loops_(loops),
        occurrences_(u_.ids, u_.num_ids, u_.num_rows, pool),
        blocks_((occurrences_.size() + kBlock - 1) / kBlock),
        workers_(WorkersFor(Traffic(), pool)),
        ahead_(std::clamp(kLinesAhead / LinesOfOccurrence(), kLeastAhead, kMostAhead)),
        piece_(u_.lazy ? u_.dim : std::max(u_.dim, kSweepPiece)),
        buffers_(new float[workers_ * 4 * piece_]),
        partial_sums_(new float[u_.accumulate ? blocks_ * 2 * u_.dim : 0]) {}

  void Run() {
    if (u_.accumulate) {
      ForEach(blocks_, [this](const Buffers& own, int64_t b) { Sum(own, b); });
      ForEach(blocks_, [this](const Buffers& own, int64_t b) { Join(own, b); });
    } else {
      ForEach(blocks_, [this](const Buffers& own, int64_t b) { StepEach(own, b); });
    }
    if (!u_.lazy) {
      const int64_t rows = std::max<int64_t>(1, kSweepBlock / u_.dim);
      ForEach((u_.num_rows + rows - 1) / rows, [=](const Buffers& own, int64_t part) {
        Sweep(own, part * rows, std::min((part + 1) * rows, u_.num_rows));
      });
    }
  }

 private:
  template <typename Body>
  void ForEach(int64_t parts, const Body& body) {
    ParallelFor(pool_, workers_, parts, [&](int64_t worker, int64_t part) {
      float* own = &buffers_[worker * 4 * piece_];
      body({own, own + piece_, own + 2 * piece_, own + 3 * piece_}, part);
    });
  }

  // Bytes, about: the lines of every occurrence, or of the whole table.
  int64_t Traffic() const {
    const int64_t rows = u_.lazy ? 0 : u_.num_rows;
    return (occurrences_.size() + rows) * LinesOfOccurrence() * kCacheLine;
  }

  int64_t LinesOfOccurrence() const {
    int64_t lines = 0;
    for (const Matrix& x : {u_.grads, u_.table, u_.momenta, u_.velocities}) {
      lines += std::min(LinesOfRow(x, u_.dim), kMostLinesOfRow);
    }
    return lines;
  }

  uint32_t row(int64_t i) const { return occurrences_[i].row; }
  bool BeginsRun(int64_t i) const { return i == 0 || row(i - 1) != row(i); }
  bool EndsRun(int64_t i) const {
    return i + 1 == occurrences_.size() || row(i + 1) != row(i);
  }
  int64_t begin(int64_t block) const { return block * kBlock; }
  int64_t end(int64_t block) const {
    return std::min(begin(block) + kBlock, occurrences_.size());
  }
  float* head(int64_t block) { return &partial_sums_[block * 2 * u_.dim]; }
  float* tail(int64_t block) { return head(block) + u_.dim; }

  // Pass 1.
  void Sum(const Buffers& own, int64_t block) {
    const int64_t end = this->end(block);
    for (int64_t first = begin(block), last; first < end; first = last + 1) {
      last = first;
      while (last + 1 < end && !EndsRun(last)) ++last;
      const bool whole = BeginsRun(first) && EndsRun(last);
      float* sum = own.sum;
      if (!whole) sum = BeginsRun(first) ? tail(block) : head(block);
      std::fill_n(sum, u_.dim, 0.0f);
      for (int64_t i = first; i <= last; ++i) AddGradient(i, sum);
      if (whole) StepRow(own, row(first), sum);
    }
  }

  // Pass 2.
  void Join(const Buffers& own, int64_t block) {
    const int64_t first = begin(block), last = end(block) - 1;
    const uint32_t shared = row(last);
    const bool begins_here = row(first) != shared || BeginsRun(first);
    if (EndsRun(last) || !begins_here) return;
    float* sum = tail(block);
    while (++block < blocks_ && row(begin(block)) == shared) {
      loops_.add(sum, head(block), 1, u_.dim);
    }
    StepRow(own, shared, sum);
  }

  // Passes 1 and 2 without accumulation.
  void StepEach(const Buffers& own, int64_t block) {
    for (int64_t first = begin(block); first < end(block); ++first) {
      if (!BeginsRun(first)) continue;
      const int64_t element = row(first) * u_.dim;
      const Row floats = Open(own, element, u_.dim);
      for (int64_t i = first;; ++i) {
        std::fill_n(own.sum, u_.dim, 0.0f);
        AddGradient(i, own.sum);
        loops_.step(floats.w, floats.m, floats.v, own.sum, u_.dim, u_.formula);
        if (EndsRun(i)) break;
      }
      Close(floats, element, u_.dim);
    }
  }

  // Pass 3: the rows in [row, end) that no occurrence names. What lies between two that
  // are named is one stretch of memory.
  void Sweep(const Buffers& own, int64_t row, int64_t end) {
    std::fill_n(own.sum, piece_, 0.0f);
    int64_t i = FirstAtOrAfter(row);
    while (row < end) {
      const bool more = i < occurrences_.size() && this->row(i) < end;
      const int64_t named = more ? this->row(i) : end;
      const int64_t stop = named * u_.dim;
      for (int64_t element = row * u_.dim; element < stop; element += piece_) {
        StepWeights(own, element, std::min(piece_, stop - element), own.sum);
      }
      row = named + 1;
      while (i < occurrences_.size() && this->row(i) < row) ++i;
    }
  }

  int64_t FirstAtOrAfter(int64_t row) const {
    int64_t low = 0, high = occurrences_.size();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (this->row(middle) < row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  void AddGradient(int64_t i, float* sum) {
    Prefetch(i + ahead_);
    const int64_t position = occurrences_[i].position;
    const int64_t source = u_.sources[position];
    if (source < 0 || source >= u_.num_grads) return;
    const float gain = u_.gains == nullptr ? 1 : u_.gains[position];
    const char* gradient = At(u_.grads, source * u_.dim);
    if (u_.grads.is_bfloat16) {
      const auto* x = reinterpret_cast<const BFloat16*>(gradient);
      loops_.add_bfloat16(sum, x, gain, u_.dim);
    } else {
      loops_.add(sum, reinterpret_cast<const float*>(gradient), gain, u_.dim);
    }
  }

  // Asks for the memory that occurrence i will need. Inlined, since GCC takes a
  // function that only prefetches for one without effects, and drops the calls.
  [[gnu::always_inline]] void Prefetch(int64_t i) const {
    if (i >= occurrences_.size()) return;
    const int64_t source = u_.sources[occurrences_[i].position];
    if (source >= 0 && source < u_.num_grads) PrefetchRow(u_.grads, source);
    if (!BeginsRun(i)) return;
    PrefetchRow(u_.table, row(i));
    PrefetchRow(u_.momenta, row(i));
    PrefetchRow(u_.velocities, row(i));
  }

  // Into the second-level cache: the first has too few misses under way at a time.
  [[gnu::always_inline]] void PrefetchRow(const Matrix& x, int64_t row) const {
    const char* line = At(x, row * u_.dim);
    const int64_t lines = std::min(LinesOfRow(x, u_.dim), kMostLinesOfRow);
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line + i * kCacheLine, 0, 2);
  }

  void StepRow(const Buffers& own, int64_t row, const float* gradient) {
    StepWeights(own, row * u_.dim, u_.dim, gradient);
  }

  void StepWeights(const Buffers& own, int64_t element, int64_t size,
                   const float* gradient) {
    const Row row = Open(own, element, size);
    loops_.step(row.w, row.m, row.v, gradient, size, u_.formula);
    Close(row, element, size);
  }

  // Weights and slots as float32: the tables' own memory where they are float32.
  struct Row {
    float *w, *m, *v;
  };

  Row Open(const Buffers& own, int64_t element, int64_t size) {
    return {OpenOne(u_.table, own.w, element, size),
            OpenOne(u_.momenta, own.m, element, size),
            OpenOne(u_.velocities, own.v, element, size)};
  }

  float* OpenOne(const Matrix& x, float* buffer, int64_t element, int64_t size) {
    char* stored = At(x, element);
    if (!x.is_bfloat16) return reinterpret_cast<float*>(stored);
    loops_.widen(buffer, reinterpret_cast<const BFloat16*>(stored), size);
    return buffer;
  }

  void Close(const Row& row, int64_t element, int64_t size) {
    CloseOne(u_.table, row.w, element, size);
    CloseOne(u_.momenta, row.m, element, size);
    CloseOne(u_.velocities, row.v, element, size);
  }

  void CloseOne(const Matrix& x, const float* floats, int64_t element, int64_t size) {
    if (!x.is_bfloat16) return;
    loops_.round(reinterpret_cast<BFloat16*>(At(x, element)), floats, size);
  }

  const Update& u_;
  Pool& pool_;
  const Loops& loops_;
  const SortedOccurrences occurrences_;
  const int64_t blocks_;
  const int64_t workers_;
  const int64_t ahead_;
  const int64_t piece_;  // floats of one buffer
  const std::unique_ptr<float[]> buffers_;
  const std::unique_ptr<float[]> partial_sums_;
};

}  // namespace

void Run(const Update& update, Pool& pool, const Loops& loops) {
  Updater(update, pool, loops).Run();
}

}  // namespace sparse_adam
