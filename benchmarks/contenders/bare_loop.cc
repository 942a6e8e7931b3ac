// The memory traffic of an update and none of its work: the yardstick of rows that lie
// anywhere, as a copy is that of memory that is read from one end to the other.

#include <cstdint>
#include <initializer_list>

namespace {

constexpr int64_t kLine = 16;    // float32 numbers of a cache line
constexpr int64_t kLines = 256;  // that are asked for ahead, as in the CPU kernel

void Ask(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 0, 2);
}

}  // namespace

// Reads the gradient of each occurrence, and reads and writes the three rows of each
// id. Occurrences come in the order of their ids; `begin` is the first of a run.
extern "C" void Touch(float* __restrict w, float* __restrict m, float* __restrict v,
                      const float* __restrict grads, const int32_t* ids, const int32_t* positions,
                      int64_t begin, int64_t end, int64_t dim) {
  const int64_t lines = 4 * ((dim + kLine - 1) / kLine);
  const int64_t ahead = kLines / lines < 2 ? 2 : kLines / lines;
  for (int64_t i = begin; i < end; ++i) {
    if (const int64_t next = i + ahead; next < end) {
      Ask(grads + positions[next] * dim, dim);
      if (ids[next] != ids[next - 1]) {
        for (const float* x : {w, m, v}) Ask(x + ids[next] * dim, dim);
      }
    }
    const float* gradient = grads + positions[i] * dim;
    const int64_t row = ids[i] * dim;
    for (int64_t d = 0; d < dim; ++d) {
      w[row + d] += gradient[d];
      m[row + d] += gradient[d];
      v[row + d] += gradient[d];
    }
  }
}
