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

constexpr int64_t kBlock = 128 / kFineness;             // occurrences
constexpr int64_t kSweepBlock = (1 << 16) / kFineness;  // weights, about
constexpr int64_t kSweepPiece = 1024;   // weights that pass the buffers at a time
constexpr int64_t kCacheLine = 64;      // bytes
constexpr int64_t kMostLinesOfRow = 8;  // the processor sees others coming
constexpr int64_t kLinesOfNarrow = 8;   // of an occurrence of narrow rows

int64_t LinesOfRow(const Matrix& x, int64_t dim) {
  return (dim * ItemSize(x.encoding) + kCacheLine - 1) / kCacheLine;
}

// All that one occurrence needs.
int64_t LinesOfOccurrence(const Update& u) {
  int64_t lines = LinesOfRow(u.grads, u.dim);
  for (int t = 0; t < u.state.num_arrays; ++t) {
    lines += LinesOfRow(u.state.arrays[t], u.dim);
  }
  return lines + u.state.num_row_arrays;
}

// Float32 scratch of one worker: a sum of gradients, and a piece of each array.
struct Buffers {
  float* sum;
  int64_t piece;

  float* OfArray(int t) const { return sum + (t + 1) * piece; }
};

// Memory is asked for ahead: that of narrow rows into the first-level cache, which has
// few misses under way at a time, that of others, and more of it, into the second.
//
// The loops over arrays are short and made for each row, so their length is known when
// they are compiled: kArrays, for rules with so many arrays of one number for each
// weight and no others; 0 for all other rules.
template <bool kNarrow, int kArrays>
class Updater {
 public:
  Updater(const Update& update, Pool& pool, const Loops& loops)
      : u_(update),
        pool_(pool),
        loops_(loops),
        step_(u_.rule->steps[loops.level][u_.numbers.decays ||
                                          u_.numbers.gradient_scale != 1]),
        occurrences_(u_.ids, u_.num_ids, u_.num_rows, pool),
        blocks_((occurrences_.size() + kBlock - 1) / kBlock),
        workers_(WorkersFor(Traffic(), pool)),
        ahead_(std::clamp(kLinesAhead / LinesOfOccurrence(u_), kLeast, kMost)),
        piece_(u_.lazy ? u_.dim : std::max(u_.dim, kSweepPiece)),
        scratch_((1 + u_.state.num_arrays) * piece_),
        buffers_(new float[workers_ * scratch_]),
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
  static constexpr int kLocality = kNarrow ? 3 : 2;
  static constexpr int64_t kLinesAhead = kNarrow ? 48 : 256;
  static constexpr int64_t kLeast = 2, kMost = 32;  // occurrences ahead

  int num_arrays() const { return kArrays > 0 ? kArrays : u_.state.num_arrays; }
  int num_row_arrays() const { return kArrays > 0 ? 0 : u_.state.num_row_arrays; }

  template <typename Body>
  void ForEach(int64_t parts, const Body& body) {
    ParallelFor(pool_, workers_, parts, [&](int64_t worker, int64_t part) {
      body({&buffers_[worker * scratch_], piece_}, part);
    });
  }

  // Bytes, about: the lines of every occurrence, or of the whole table.
  int64_t Traffic() const {
    const int64_t rows = u_.lazy ? 0 : u_.num_rows;
    return (occurrences_.size() + rows) * LinesOfOccurrence(u_) * kCacheLine;
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
      for (int64_t i = first; i <= last; ++i) AddGradient(i, sum, i == first);
      if (whole) Step(own, StretchOf(row(first), 1), sum);
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
      loops_.add(sum, head(block), 1, u_.dim, false);
    }
    Step(own, StretchOf(shared, 1), sum);
  }

  // Passes 1 and 2 without accumulation.
  void StepEach(const Buffers& own, int64_t block) {
    for (int64_t first = begin(block); first < end(block); ++first) {
      if (!BeginsRun(first)) continue;
      const Stretch stretch = StretchOf(row(first), 1);
      const Opened opened = Open(own, stretch);
      for (int64_t i = first;; ++i) {
        AddGradient(i, own.sum, true);
        StepOpened(opened, stretch, own.sum);
        if (EndsRun(i)) break;
      }
      Close(opened, stretch);
    }
  }

  // Pass 3: the rows in [row, end) that no occurrence names.
  void Sweep(const Buffers& own, int64_t row, int64_t end) {
    std::fill_n(own.sum, piece_, 0.0f);
    int64_t i = FirstAtOrAfter(row);
    while (row < end) {
      const bool more = i < occurrences_.size() && this->row(i) < end;
      const int64_t named = more ? this->row(i) : end;
      while (row < named) {
        const int64_t rows = std::min(named - row, RowsInOneStretch(row));
        Step(own, StretchOf(row, rows), own.sum);
        row += rows;
      }
      row = named + 1;
      while (i < occurrences_.size() && this->row(i) < row) ++i;
    }
  }

  // How many rows, this one and those behind it, are one stretch of memory that the
  // buffers hold.
  int64_t RowsInOneStretch(int64_t row) const {
    if (u_.state.stride != u_.dim) return 1;
    const int64_t in_group = u_.state.rows_per_group - row % u_.state.rows_per_group;
    return std::min(in_group, std::max<int64_t>(1, piece_ / u_.dim));
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

  void AddGradient(int64_t i, float* sum, bool fresh) {
    Prefetch(i + ahead_);
    const int64_t position = occurrences_[i].position;
    const int64_t source = u_.sources[position];
    if (source < 0 || source >= u_.num_grads) {
      if (fresh) std::fill_n(sum, u_.dim, 0.0f);
      return;
    }
    const float gain = u_.gains == nullptr ? 1 : u_.gains[position];
    const char* gradient = u_.grads.At(source * u_.dim);
    if (u_.grads.encoding == Encoding::kFloat32) {
      const auto* x = reinterpret_cast<const float*>(gradient);
      loops_.add(sum, x, gain, u_.dim, fresh);
    } else {
      const auto* x = reinterpret_cast<const BFloat16*>(gradient);
      loops_.add_bfloat16(sum, x, gain, u_.dim, fresh);
    }
  }

  // Asks for the memory that occurrence i will need. Inlined, since GCC takes a
  // function that only prefetches for one without effects, and drops the calls.
  [[gnu::always_inline]] void Prefetch(int64_t i) const {
    if (i >= occurrences_.size()) return;
    const int64_t source = u_.sources[occurrences_[i].position];
    if (source >= 0 && source < u_.num_grads) PrefetchRow(u_.grads, source * u_.dim);
    if (!BeginsRun(i)) return;
    const int64_t place = u_.state.Place(row(i));
    for (int t = 0; t < num_arrays(); ++t) {
      if (!SeenComing(t)) PrefetchRow(u_.state.arrays[t], place);
    }
    for (int t = 0; t < num_row_arrays(); ++t) {
      __builtin_prefetch(u_.state.row_arrays[t] + row(i), 0, kLocality);
    }
  }

  // Whether the rows of array t are the same lines as those of another, or follow them:
  // a group of one row is one stretch of memory.
  bool SeenComing(int t) const {
    const bool follows = t > 0 && u_.state.rows_per_group == 1 && u_.state.group_stride;
    return follows || u_.state.arrays[t].encoding == Encoding::kHighHalf;
  }

  [[gnu::always_inline]] void PrefetchRow(const Matrix& x, int64_t place) const {
    const char* line = x.At(place);
    const int64_t lines = std::min(LinesOfRow(x, u_.dim), kMostLinesOfRow);
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(line + i * kCacheLine, 0, kLocality);
    }
  }

  // What follows is called for each row and inlined, which narrow rows notice: they
  // take 1.2 times as long without.

  // Rows that stand together.
  struct Stretch {
    int64_t row;  // the first
    int64_t rows;
    int64_t place;
    int64_t size;      // in items
    uint32_t element;  // of the noise
  };

  [[gnu::always_inline]] Stretch StretchOf(int64_t row, int64_t rows) const {
    const auto element = static_cast<uint32_t>(row * u_.dim);
    return {row, rows, u_.state.Place(row), rows * u_.dim, element};
  }

  [[gnu::always_inline]] void Step(const Buffers& own, const Stretch& stretch,
                                   const float* gradient) {
    const Opened opened = Open(own, stretch);
    StepOpened(opened, stretch, gradient);
    Close(opened, stretch);
  }

  // Weights and slots as float32: the tables' own memory where they are float32.
  struct Opened {
    float* values[kMostArrays];
    float* row_values[kMostArrays];
  };

  [[gnu::always_inline]] void StepOpened(const Opened& opened, const Stretch& stretch,
                                         const float* gradient) {
    step_(u_.prepared, u_.numbers, opened.values, opened.row_values, gradient,
          stretch.rows, u_.dim);
    if (u_.numbers.ema_share != 0) {
      float* ema = opened.values[num_arrays() - 1];
      loops_.average(ema, opened.values[0], u_.numbers.ema_share, stretch.size);
    }
  }

  [[gnu::always_inline]] Opened Open(const Buffers& own, const Stretch& stretch) {
    Opened opened;
    for (int t = 0; t < num_arrays(); ++t) {
      const Matrix& x = u_.state.arrays[t];
      char* stored = x.At(stretch.place);
      if (x.encoding == Encoding::kFloat32) {
        opened.values[t] = reinterpret_cast<float*>(stored);
      } else {
        opened.values[t] = own.OfArray(t);
        CodecOf(x).widen(opened.values[t], stored, stretch.size);
      }
    }
    for (int t = 0; t < num_row_arrays(); ++t) {
      opened.row_values[t] = u_.state.row_arrays[t] + stretch.row;
    }
    return opened;
  }

  [[gnu::always_inline]] void Close(const Opened& opened, const Stretch& stretch) {
    for (int t = 0; t < num_arrays(); ++t) {
      const Matrix& x = u_.state.arrays[t];
      if (x.encoding == Encoding::kFloat32) continue;
      char* stored = x.At(stretch.place);
      if (u_.stochastic) {
        const Noise noise = {static_cast<uint32_t>(u_.seeds[t]), stretch.element};
        CodecOf(x).round_with(stored, opened.values[t], stretch.size, noise);
      } else {
        CodecOf(x).round(stored, opened.values[t], stretch.size);
      }
    }
  }

  const Codec& CodecOf(const Matrix& x) const {
    return loops_.codecs[static_cast<int>(x.encoding)];
  }

  const Update& u_;
  Pool& pool_;
  const Loops& loops_;
  const StepFunction step_;
  const SortedOccurrences occurrences_;
  const int64_t blocks_;
  const int64_t workers_;
  const int64_t ahead_;
  const int64_t piece_;    // floats of one buffer
  const int64_t scratch_;  // floats of one worker
  const std::unique_ptr<float[]> buffers_;
  const std::unique_ptr<float[]> partial_sums_;
};

template <bool kNarrow>
void RunUpdater(const Update& update, Pool& pool, const Loops& loops) {
  switch (update.state.num_row_arrays == 0 ? update.state.num_arrays : 0) {
    case 1:
      return Updater<kNarrow, 1>(update, pool, loops).Run();
    case 2:
      return Updater<kNarrow, 2>(update, pool, loops).Run();
    case 3:
      return Updater<kNarrow, 3>(update, pool, loops).Run();
    default:
      return Updater<kNarrow, 0>(update, pool, loops).Run();
  }
}

}  // namespace

void Run(const Update& update, Pool& pool, const Loops& loops) {
  if (LinesOfOccurrence(update) <= kLinesOfNarrow) {
    RunUpdater<true>(update, pool, loops);
  } else {
    RunUpdater<false>(update, pool, loops);
  }
}

}  // namespace sparse_adam
