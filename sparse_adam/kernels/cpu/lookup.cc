// The ids of a call are cut into parts, several for each thread. A sample lies in one
// part, and its rows are added one after the other: so the parts may depend on the
// threads, and the result does not.
//
// A part is read in windows. First a loop over the ids makes a list of rows, without
// the ids that are not there; then the loops over the lanes read the rows. So the
// latter, which wait for memory, check and divide nothing, and know the rows that
// come next.

#include "lookup.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "lookup_loops.h"

namespace sparse_adam {
namespace {

constexpr int64_t kCacheLine = 64;      // bytes
constexpr int64_t kWindow = 1024;       // rows, or samples
constexpr int64_t kLinesAhead = 128;    // cache lines that are asked for
constexpr int64_t kLeastAhead = 4;      // rows
constexpr int64_t kMostAhead = 32;      // rows
constexpr int64_t kPartsOfWorker = 8;   // enough to balance
constexpr int64_t kNarrowSamples = 16;  // that are rounded at a time

int64_t LinesOfRow(const Weights& weights) {
  const int64_t bytes = weights.dim * ItemSize(weights.encoding);
  return (bytes + kCacheLine - 1) / kCacheLine;
}

int64_t RowsAhead(const Weights& weights) {
  return std::clamp(kLinesAhead / LinesOfRow(weights), kLeastAhead, kMostAhead);
}

int64_t PartsFor(int64_t workers) {
  return workers == 1 ? 1 : workers * kPartsOfWorker;
}

// Finds rows by their ids.
class RowFinder {
 public:
  explicit RowFinder(const Weights& weights)
      : data_(weights.data),
        row_bytes_(weights.stride * ItemSize(weights.encoding)),
        group_bytes_(weights.group_stride * ItemSize(weights.encoding)),
        rows_per_group_(static_cast<uint32_t>(weights.rows_per_group)),
        num_rows_(static_cast<uint32_t>(weights.num_rows)),
        grouped_(weights.grouped()) {}

  bool grouped() const { return grouped_; }
  bool Has(uint32_t id) const { return id < num_rows_; }  // a negative one is large

  // Any pointer, if there is no such row.
  template <bool kGrouped>
  const char* Find(uint32_t id) const {
    if constexpr (!kGrouped) return data_ + id * row_bytes_;
    return data_ + id / rows_per_group_ * group_bytes_ +
           id % rows_per_group_ * row_bytes_;
  }

 private:
  const char* const data_;
  const int64_t row_bytes_, group_bytes_;
  const uint32_t rows_per_group_, num_rows_;
  const bool grouped_;
};

class Looker {
 public:
  Looker(const Lookup& lookup, Pool& pool, const Loops& loops)
      : u_(lookup), pool_(pool), copy_(CopyOf(*LookupLoopsAt(loops.level))) {}

  void Run() {
    const int64_t lines = LinesOfRow(u_.weights);
    const int64_t workers = WorkersFor(2 * u_.num_ids * lines * kCacheLine, pool_);
    const int64_t parts = PartsFor(workers);
    const auto copy = RowFinder(u_.weights).grouped() ? &Looker::Copy<true>
                                                      : &Looker::Copy<false>;
    ParallelFor(pool_, workers, parts, [&](int64_t, int64_t part) {
      (this->*copy)(u_.num_ids * part / parts, u_.num_ids * (part + 1) / parts);
    });
  }

 private:
  using CopyRows = std::remove_extent_t<decltype(LookupLoops::copy_as_float32)>;

  CopyRows CopyOf(const LookupLoops& loops) const {
    const int encoding = static_cast<int>(u_.weights.encoding);
    return u_.encoding == Encoding::kFloat32 ? loops.copy_as_float32[encoding]
                                             : loops.copy_as_bfloat16[encoding];
  }

  template <bool kGrouped>
  void Copy(int64_t begin, int64_t end) const {
    const RowFinder finder(u_.weights);
    const int64_t ahead = RowsAhead(u_.weights), dim = u_.weights.dim;
    const char* rows[kWindow + kMostAhead];
    while (begin < end) {
      // The last rows of a window are found only so that they are asked for.
      const int64_t found = std::min(end - begin, kWindow);
      const int64_t copied = found < end - begin ? found - ahead : found;
      for (int64_t i = 0; i < found; ++i) {
        const uint32_t id = u_.ids[begin + i];
        rows[i] = finder.Has(id) ? finder.Find<kGrouped>(id) : nullptr;
      }
      std::fill_n(rows + found, ahead, u_.weights.data);
      copy_(u_.out + begin * dim * ItemSize(u_.encoding), {rows, ahead, copied}, dim);
      begin += copied;
    }
  }

  const Lookup& u_;
  Pool& pool_;
  const CopyRows copy_;
};

// Rows that have been found and not been added, sample by sample: numbers of rows, or
// pointers where they stand in groups.
struct Window {
  // With room for stand-ins at the end.
  uint32_t numbers[kWindow + kMostAhead];
  const char* rows[kWindow + kMostAhead];
  float gains[kWindow];
  int32_t ends[kWindow];  // where in `rows` each sample ends
  int64_t num_rows = 0, num_samples = 0;

  // Drops the first rows and samples.
  void Drop(int64_t dropped_rows, int64_t dropped_samples, bool grouped) {
    if (grouped) {
      std::copy(rows + dropped_rows, rows + num_rows, rows);
    } else {
      std::copy(numbers + dropped_rows, numbers + num_rows, numbers);
    }
    std::copy(gains + dropped_rows, gains + num_rows, gains);
    std::copy(ends + dropped_samples, ends + num_samples, ends);
    num_rows -= dropped_rows;
    num_samples -= dropped_samples;
    for (int64_t s = 0; s < num_samples; ++s) ends[s] -= dropped_rows;
  }
};

// The ids of a batch, and their gains, in the order of their samples: those of one
// sample in the order of the batch. A counting sort, in as many parts as pay.
class OrderedIds {
 public:
  OrderedIds(const Combine& u, Pool& pool)
      : ids_(new int32_t[u.num_ids]),
        gains_(u.gains == nullptr ? nullptr : new float[u.num_ids]),
        starts_(u.num_samples + 1) {
    const int64_t most =
        u.num_samples > u.num_ids ? 1 : std::max<int64_t>(1, pool.num_threads());
    const int64_t parts =
        std::min({std::max<int64_t>(1, u.num_ids / kIdsOfPart), most, kMostParts});
    std::vector<uint32_t> counters(parts * u.num_samples);
    const auto for_each = [&](const auto& body) {
      ParallelFor(pool, parts, parts, [&](int64_t, int64_t part) {
        uint32_t* const counter = counters.data() + part * u.num_samples;
        const int64_t end = u.num_ids * (part + 1) / parts;
        for (int64_t i = u.num_ids * part / parts; i < end; ++i) {
          const uint32_t sample = u.samples[i];  // a negative one becomes large
          if (sample < u.num_samples) body(counter[sample], i);
        }
      });
    };
    for_each([](uint32_t& counter, int64_t) { ++counter; });
    uint32_t place = 0;
    for (int64_t s = 0; s < u.num_samples; ++s) {
      starts_[s] = place;
      for (int64_t part = 0; part < parts; ++part) {
        uint32_t& counter = counters[part * u.num_samples + s];
        const uint32_t count = counter;
        counter = place;
        place += count;
      }
    }
    starts_[u.num_samples] = place;
    for_each([&](uint32_t& counter, int64_t i) {
      ids_[counter] = u.ids[i];
      if (u.gains != nullptr) gains_[counter] = u.gains[i];
      ++counter;
    });
  }

  const int32_t* ids() const { return ids_.get(); }
  const float* gains() const { return gains_.get(); }
  int64_t Start(int64_t sample) const { return starts_[sample]; }

 private:
  static constexpr int64_t kIdsOfPart = 8192 / kFineness, kMostParts = 16;

  const std::unique_ptr<int32_t[]> ids_;
  const std::unique_ptr<float[]> gains_;
  std::vector<uint32_t> starts_;  // of each sample, and the end
};

class Combiner {
 public:
  Combiner(const Combine& combine, Pool& pool, const Loops& loops)
      : u_(combine),
        pool_(pool),
        combine_(CombineOf(*LookupLoopsAt(loops.level))),
        round_(loops.codecs[static_cast<int>(Encoding::kBFloat16)].round),
        finder_(u_.weights),
        ahead_(RowsAhead(u_.weights)),
        workers_(WorkersFor(Traffic(), pool)),
        sums_(new float[narrow() ? workers_ * kNarrowSamples * u_.weights.dim : 0]) {
    if (u_.samples != nullptr && !SamplesAscend()) {
      ordered_ = std::make_unique<OrderedIds>(u_, pool);
    }
    ids_ = ordered_ ? ordered_->ids() : u_.ids;
    gains_ = ordered_ ? ordered_->gains() : u_.gains;
  }

  void Run() {
    const int64_t parts = PartsFor(workers_);
    ParallelFor(pool_, workers_, parts, [&](int64_t worker, int64_t part) {
      Part(worker, FirstSample(part, parts), FirstSample(part + 1, parts));
    });
  }

 private:
  using CombineRows = std::remove_extent_t<decltype(LookupLoops::combine)>;

  CombineRows CombineOf(const LookupLoops& loops) const {
    return loops.combine[static_cast<int>(u_.weights.encoding)];
  }

  bool narrow() const { return u_.encoding == Encoding::kBFloat16; }

  // Bytes, about.
  int64_t Traffic() const {
    const int64_t row = u_.weights.dim * ItemSize(u_.encoding);
    return u_.num_ids * LinesOfRow(u_.weights) * kCacheLine + u_.num_samples * row;
  }

  // Whether those that exist ascend, and all others stand behind them.
  bool SamplesAscend() const {
    int64_t descents = 0;
    for (int64_t i = 1; i < u_.num_ids; ++i) {
      const uint32_t before = u_.samples[i - 1], sample = u_.samples[i];
      descents += sample < before;
    }
    return descents == 0;
  }

  // The first id of a sample, or of the next one that has ids. From here on the ids are
  // in the order of their samples.
  int64_t Start(int64_t sample) const {
    if (ordered_) return ordered_->Start(sample);
    if (u_.samples == nullptr) return sample * u_.places;
    const auto* const samples = reinterpret_cast<const uint32_t*>(u_.samples);
    return std::lower_bound(samples, samples + u_.num_ids, sample) - samples;
  }

  // The end of a sample whose ids from `next` on have not been read.
  int64_t EndOf(int64_t sample, int64_t next, int64_t end) const {
    if (ordered_ || u_.samples == nullptr) return Start(sample + 1);
    while (next < end && u_.samples[next] == sample) ++next;
    return next;
  }

  // Where a part begins: all have as many ids and samples, about.
  int64_t FirstSample(int64_t part, int64_t parts) const {
    if (part == 0 || part == parts) return part == 0 ? 0 : u_.num_samples;
    const int64_t share = (Start(u_.num_samples) + u_.num_samples) * part / parts;
    int64_t low = 0, high = u_.num_samples;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (Start(middle) + middle < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Writes the samples in [sample, last).
  void Part(int64_t worker, int64_t sample, const int64_t last) const {
    Window window;
    int64_t next = Start(sample), read = sample;  // what will be read
    const int64_t end = Start(last);
    bool begins = true;  // no row of `sample` has been added
    while (sample < last) {
      Read(window, next, read, end, last);
      const bool all = read == last;
      // As long as there are more, the last rows stay: so all are asked for ahead.
      const bool full = window.num_rows == kWindow && !all;
      const int64_t most = full ? kWindow - ahead_ : window.num_rows;
      std::fill_n(window.rows + window.num_rows, ahead_, u_.weights.data);
      std::fill_n(window.numbers + window.num_rows, ahead_, 0);
      int64_t samples = 0, rows = 0;
      while (samples < window.num_samples && window.ends[samples] <= most) {
        rows = window.ends[samples++];
      }
      if (samples != 0) {
        Add(worker, window, sample, samples, begins, true);
        begins = true;
      } else {
        // A sample that no window holds.
        rows = most;
        int32_t kept = window.num_samples == 0 ? 0 : window.ends[0];
        window.ends[0] = static_cast<int32_t>(rows);
        Add(worker, window, sample, 1, begins, false);
        window.ends[0] = kept;
        begins = false;
      }
      window.Drop(rows, samples, finder_.grouped());
      sample += samples;
    }
  }

  // Fills a window up with the ids from `next` on, of the samples from `read` on.
  void Read(Window& window, int64_t& next, int64_t& read, int64_t end,
            int64_t last) const {
    while (read < last && window.num_rows < kWindow && window.num_samples < kWindow) {
      const int64_t end_of_sample = EndOf(read, next, end);
      const int64_t stop = std::min(end_of_sample, next + kWindow - window.num_rows);
      Find(window, next, stop);
      next = stop;
      if (next < end_of_sample) continue;
      window.ends[window.num_samples++] = static_cast<int32_t>(window.num_rows);
      ++read;
    }
  }

  // Appends the rows of the ids in [begin, end) that are there, and their gains.
  void Find(Window& window, int64_t begin, int64_t end) const {
    if (!finder_.grouped() && AllThere(begin, end)) {
      std::copy(ids_ + begin, ids_ + end, window.numbers + window.num_rows);
      if (gains_ != nullptr) {
        std::copy(gains_ + begin, gains_ + end, window.gains + window.num_rows);
      }
      window.num_rows += end - begin;
      return;
    }
    int64_t size = window.num_rows;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t id = ids_[i];
      if (!finder_.Has(id)) continue;
      if (finder_.grouped()) {
        window.rows[size] = finder_.Find<true>(id);
      } else {
        window.numbers[size] = id;
      }
      if (gains_ != nullptr) window.gains[size] = gains_[i];
      ++size;
    }
    window.num_rows = size;
  }

  // Whether all ids in [begin, end) are those of rows. Without a branch on one of them.
  bool AllThere(int64_t begin, int64_t end) const {
    uint32_t wild = 0;
    for (int64_t i = begin; i < end; ++i) wild |= !finder_.Has(ids_[i]);
    return wild == 0;
  }

  // Adds the first `count` samples of a window.
  void Add(int64_t worker, const Window& window, int64_t sample, int64_t count,
           bool begins, bool ends) const {
    const int64_t dim = u_.weights.dim;
    const float* const gains = gains_ == nullptr ? nullptr : window.gains;
    const float* const scales = u_.scales == nullptr ? nullptr : u_.scales + sample;
    if (!narrow()) {
      float* const sums = reinterpret_cast<float*>(u_.out) + sample * dim;
      combine_(sums,
               ListOf(window, 0, gains, window.ends, count, scales, begins, ends), dim);
      return;
    }
    float* const sums = &sums_[worker * kNarrowSamples * dim];
    for (int64_t s = 0; s < count; s += kNarrowSamples) {
      const int64_t some = std::min(kNarrowSamples, count - s);
      int32_t own_ends[kNarrowSamples];
      const int64_t first = s == 0 ? 0 : window.ends[s - 1];
      for (int64_t k = 0; k < some; ++k) {
        own_ends[k] = static_cast<int32_t>(window.ends[s + k] - first);
      }
      combine_(sums,
               ListOf(window, first, gains, own_ends, some,
                      scales == nullptr ? nullptr : scales + s, s > 0 || begins, ends),
               dim);
      char* const out = u_.out + (sample + s) * dim * ItemSize(u_.encoding);
      if (ends) round_(out, sums, some * dim);
    }
  }

  SampleList ListOf(const Window& window, int64_t first, const float* gains,
                    const int32_t* ends, int64_t count, const float* scales,
                    bool begins, bool ends_here) const {
    SampleList list = {};
    list.first = u_.weights.data;
    list.row_bytes = u_.weights.stride * ItemSize(u_.weights.encoding);
    if (finder_.grouped()) {
      list.rows = window.rows + first;
    } else {
      list.numbers = window.numbers + first;
    }
    list.gains = gains == nullptr ? nullptr : gains + first;
    list.ahead = ahead_;
    list.ends = ends;
    list.count = count;
    list.scales = scales;
    list.begins = begins;
    list.ends_here = ends_here;
    return list;
  }

  const Combine& u_;
  Pool& pool_;
  const CombineRows combine_;
  void (*const round_)(void* to, const float* from, int64_t size);
  const RowFinder finder_;
  const int64_t ahead_;
  const int64_t workers_;
  const std::unique_ptr<float[]> sums_;  // of each worker, where the result is narrow
  std::unique_ptr<OrderedIds> ordered_;  // null: the ids came in order
  const int32_t* ids_;                   // in order
  const float* gains_;
};

}  // namespace

void Run(const Lookup& lookup, Pool& pool, const Loops& loops) {
  Looker(lookup, pool, loops).Run();
}

void Run(const Combine& combine, Pool& pool, const Loops& loops) {
  Combiner(combine, pool, loops).Run();
}

}  // namespace sparse_adam
