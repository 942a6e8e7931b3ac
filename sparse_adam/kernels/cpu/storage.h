// Where the weights and slots of a row stand.

#ifndef SPARSE_ADAM_STORAGE_H_
#define SPARSE_ADAM_STORAGE_H_

#include <cstdint>

#include "loops.h"

namespace sparse_adam {

// Rows of some encoding, one after the other.
struct Matrix {
  char* data;
  Encoding encoding;

  char* At(int64_t place) const { return data + place * ItemSize(encoding); }
};

// Where the rows of an array stand. Plain arrays are one group; in packed storage (see
// `kernels/layout.py`) a group is the rows that share lines.
struct Groups {
  int64_t rows_per_group;  // at least 1
  int64_t stride;          // items from a row of a group to the next one
  int64_t group_stride;    // items from a group to the next one

  int64_t Place(int64_t row) const {
    return row / rows_per_group * group_stride + row % rows_per_group * stride;
  }

  // What the rows of a group take, of num_rows in all.
  int64_t Size(int64_t num_rows, int64_t dim) const {
    const int64_t rows = num_rows < rows_per_group ? num_rows : rows_per_group;
    return (rows - 1) * stride + dim;
  }

  // Where memory ends that rows 0 to num_rows - 1 may touch.
  int64_t End(int64_t num_rows, int64_t dim) const {
    const int64_t groups = (num_rows + rows_per_group - 1) / rows_per_group;
    return (groups - 1) * group_stride + Size(num_rows, dim);
  }
};

constexpr int kMostArrays = 8;  // of a state

// The weights and slots of a table, arrays that may share memory. A row is `dim` items
// of each; those of row r are at the same place in all of them. Slots of one number for
// each row stand apart.
struct Storage : Groups {
  Matrix arrays[kMostArrays];  // the weights first, then the slots
  int num_arrays;
  float* row_arrays[kMostArrays];  // [V] each
  int num_row_arrays;
};

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_STORAGE_H_
