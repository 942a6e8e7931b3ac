// The loops over the lanes of the rows that are looked up.
//
// As those of `loops.h` they are compiled once for each instruction set, and all give
// the same bits: every operation is an IEEE float32 operation, none is contracted, and
// the rows of a sample are added in the order of the list.

#ifndef SPARSE_ADAM_LOOKUP_LOOPS_H_
#define SPARSE_ADAM_LOOKUP_LOOPS_H_

#include <cstdint>

#include "loops.h"

namespace sparse_adam {

// Rows, sample by sample: numbers of rows that stand one behind the other, or pointers
// where rows stand in groups (see `Weights::grouped`). As many as `ahead` says follow
// the last one: the loops ask for the memory of row i + ahead while they read row i.
struct SampleList {
  const char* first;        // row 0
  int64_t row_bytes;
  const uint32_t* numbers;  // or null
  const char* const* rows;  // or null
  const float* gains;       // one for each row, or null: 1
  int64_t ahead;
  const int32_t* ends;  // where in the list each sample ends
  int64_t count;        // of samples
  const float* scales;  // one for each sample, or null: 1
  bool begins;          // whether the first sample begins here
  bool ends_here;       // whether the last one ends here
};

struct RowList {
  const char* const* rows;  // null for an id outside the table
  int64_t ahead;            // as above
  int64_t count;
};

struct LookupLoops {
  // Writes the sum of gain * row of each sample, times its scale; zeros where it has no
  // row. A sample that does not begin here goes on from the sum that was written, and
  // one that does not end here is not scaled.
  void (*combine[kEncodings])(float* sums, const SampleList& list, int64_t dim);
  // Writes the rows one behind the other, as float32 or bfloat16, and zeros for those
  // that are null. bfloat16 only if the weights are, however they are encoded.
  void (*copy_as_float32[kEncodings])(void* to, const RowList& list, int64_t dim);
  void (*copy_as_bfloat16[kEncodings])(void* to, const RowList& list, int64_t dim);
};

// What the processor can run, in the order of `LoopsAt`; null beyond.
const LookupLoops* LookupLoopsAt(int i);

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_LOOKUP_LOOPS_H_
