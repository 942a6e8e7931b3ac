// The occurrences of a batch, sorted by row.

#ifndef SPARSE_ADAM_SORT_H_
#define SPARSE_ADAM_SORT_H_

#include <cstdint>
#include <memory>

#include "parallel.h"

namespace sparse_adam {

// One lookup: which row, and where in the batch.
struct Occurrence {
  uint32_t row;
  uint32_t position;
};

class SortedOccurrences {
 public:
  // Keeps the ids in [0, num_rows) and sorts them; equal ids keep their order. Ids that
  // come sorted, with all others behind them, are not sorted again.
  SortedOccurrences(const int32_t* ids, int64_t num_ids, int64_t num_rows, Pool& pool);

  int64_t size() const { return size_; }
  const Occurrence& operator[](int64_t i) const { return sorted_[i]; }

 private:
  std::unique_ptr<Occurrence[]> buffers_[2];
  const Occurrence* sorted_;
  int64_t size_;
};

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_SORT_H_
