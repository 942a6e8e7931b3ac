// The loops over the lanes of a row that every rule shares: sums, averages, encodings.
//
// They are compiled once for each instruction set and chosen when the library is first
// used. Every operation is an IEEE float32 operation, none is contracted or reordered,
// and no lane sees another: all instruction sets give the same bits. The loops of the
// rules are compiled and chosen in the same way; see rule.h.

#ifndef SPARSE_ADAM_LOOPS_H_
#define SPARSE_ADAM_LOOPS_H_

#include <cstdint>

namespace sparse_adam {

using BFloat16 = uint16_t;  // the upper half of a float32

// How numbers are stored; the values are those of `cpu.ENCODINGS`.
enum class Encoding : int32_t {
  kFloat32,
  kBFloat16,  // one after the other
  kWidened,   // a bfloat16 as the float32 of the same value
  kLowHalf,   // a bfloat16 in the lower half of a word, ...
  kHighHalf,  // and another array's in its upper half
};
constexpr int32_t kEncodings = 5;

inline int64_t ItemSize(Encoding encoding) {
  return encoding == Encoding::kBFloat16 ? 2 : 4;
}

// Random bits for stochastic rounding, those of `kernels/rounding.py`.
struct Noise {
  uint32_t seed;     // of the array
  uint32_t element;  // the number of the first element in its table, modulo 2**32
};

// An encoding other than float32.
struct Codec {
  void (*widen)(float* to, const void* from, int64_t size);
  // To the nearest, ties to even; a NaN stays a NaN.
  void (*round)(void* to, const float* from, int64_t size);
  // Up or down with the odds that make the mean exact.
  void (*round_with)(void* to, const float* from, int64_t size, Noise noise);
};

// How many instruction sets the loops are compiled for.
#if defined(__x86_64__)
constexpr int kLevels = 3;  // baseline, AVX2, AVX-512
#else
constexpr int kLevels = 1;
#endif

struct Loops {
  int level;  // which of the instruction sets, as in `RuleLoops`
  // sum[i] += gain * x[i], from 0 if the sum is a fresh one
  void (*add)(float* sum, const float* x, float gain, int64_t size, bool fresh);
  void (*add_bfloat16)(float* sum, const BFloat16* x, float gain, int64_t size,
                       bool fresh);
  // ema[i] += share * (w[i] - ema[i]), as in `sparse_adam/rules/ema.py`
  void (*average)(float* ema, const float* w, float share, int64_t size);
  Codec codecs[kEncodings];  // by encoding; that of float32 is empty
};

// What the processor can run: the i-th, the best last; null beyond.
const Loops* LoopsAt(int i);

inline const Loops& BestLoops() {
  const Loops* best = LoopsAt(0);
  for (int i = 1; const Loops* better = LoopsAt(i); ++i) best = better;
  return *best;
}

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_LOOPS_H_
