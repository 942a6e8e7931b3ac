// The lookup of rows, and of samples of several ids, whatever calls it.

#ifndef SPARSE_ADAM_LOOKUP_H_
#define SPARSE_ADAM_LOOKUP_H_

#include <cstdint>

#include "loops.h"
#include "parallel.h"
#include "storage.h"

namespace sparse_adam {

// Where the weights of a table stand, in fewer than 2**31 rows and groups.
struct Weights : Groups {
  const char* data;  // where row 0 begins
  Encoding encoding;
  int64_t num_rows;  // V
  int64_t dim;       // D

  // Whether it takes a division to find a row. Halves of words are always treated so,
  // and kBFloat16 must have a single group.
  bool grouped() const {
    return num_rows > rows_per_group || encoding == Encoding::kLowHalf ||
           encoding == Encoding::kHighHalf;
  }
};

// The caller has checked that all arrays are as large as this says; what is in them is
// checked here. A result is the same, bit for bit, whatever the pool and the loops.
// Throws std::bad_alloc and nothing else.

// Row i of the result is that of ids[i]; zeros where the id is outside [0, V).
struct Lookup {
  Weights weights;
  const int32_t* ids;  // [N]
  int64_t num_ids;     // N, below 2**31
  char* out;           // [N, D]
  Encoding encoding;   // of the result: kFloat32; or kBFloat16, if the weights are, too
};
void Run(const Lookup& lookup, Pool& pool, const Loops& loops = BestLoops());

// Row s of the result is scales[s] * sum of gains[i] * weights[ids[i]] over the ids i
// of sample s, added in float32 in the order of the ids. One outside [0, V) is left
// out, and a sample without any other is zeros.
struct Combine {
  Weights weights;
  const int32_t* ids;      // [N]
  const int32_t* samples;  // [N], in any order; an id of one outside [0, S) is ignored.
                           // Or null: id i is in sample i / places
  const float* gains;      // [N], or null: 1
  const float* scales;     // [S], or null: 1
  int64_t num_ids;         // N, below 2**31
  int64_t places;          // N / S if the samples are null, and not read otherwise
  int64_t num_samples;     // S, below 2**31
  char* out;               // [S, D]
  Encoding encoding;       // of the result: kFloat32 or kBFloat16, rounded to nearest
};
void Run(const Combine& combine, Pool& pool, const Loops& loops = BestLoops());

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_LOOKUP_H_
