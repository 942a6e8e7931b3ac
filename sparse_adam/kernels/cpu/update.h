// The update of a table, whatever calls it.

#ifndef SPARSE_ADAM_UPDATE_H_
#define SPARSE_ADAM_UPDATE_H_

#include <cstdint>

#include "loops.h"
#include "parallel.h"
#include "rule.h"
#include "storage.h"

namespace sparse_adam {

// One update. The caller has checked that the arrays are as large as this says; what
// is in them (ids, sources) is checked here.
struct Update {
  Storage state;           // changed in place
  Matrix grads;            // [B, D], float32 or bfloat16
  const int32_t* ids;      // [N]; one outside [0, V) is ignored
  const int32_t* sources;  // [N]; one outside [0, B) adds zero
  const float* gains;      // [N], or null: 1
  int64_t num_rows;        // V, below 2**31
  int64_t dim;             // D
  int64_t num_ids;         // N, below 2**31
  int64_t num_grads;       // B
  bool lazy;               // false: step every row of the table
  bool accumulate;         // false: one step for each occurrence
  bool stochastic;         // rounds with noise, else to the nearest
  int32_t seeds[kMostArrays];  // of the noise, one for each of `state.arrays`
  const RuleLoops* rule;       // takes the arrays of the state, but for an average
  PreparedRule prepared;       // by `rule->prepare`
  StepNumbers numbers;
};

// Occurrence i of row ids[i] adds gains[i] * grads[sources[i]]. The result is the same,
// bit for bit, whatever the pool and the loops. Throws std::bad_alloc and nothing else,
// before it changes anything.
void Run(const Update& update, Pool& pool, const Loops& loops = BestLoops());

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_UPDATE_H_
