#include "loops.h"

#include <cstring>

namespace sparse_adam {
namespace {

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// The bits of a float32 rounded to a bfloat16, in the upper half. What is added, below
// 2**16, decides which way. A NaN stays a NaN.
inline uint32_t Rounded(uint32_t bits, uint32_t add) {
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return (nan ? bits | 0x00400000 : bits + add) & 0xffff0000;
}

// 32 bits that look random: lowbias32, as in `kernels/rounding.py`.
inline uint32_t Mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

// How the upper half of a float32 stands in a word, beside what else is there.
struct BFloat16s {
  using Word = BFloat16;
  static uint32_t Get(Word word) { return static_cast<uint32_t>(word) << 16; }
  static Word Put(Word, uint32_t bits) { return static_cast<Word>(bits >> 16); }
};
struct WidenedFloats {
  using Word = uint32_t;
  static uint32_t Get(Word word) { return word; }
  static Word Put(Word, uint32_t bits) { return bits; }
};
struct LowHalves {
  using Word = uint32_t;
  static uint32_t Get(Word word) { return word << 16; }
  static Word Put(Word word, uint32_t bits) { return (word & 0xffff0000) | bits >> 16; }
};
struct HighHalves {
  using Word = uint32_t;
  static uint32_t Get(Word word) { return word & 0xffff0000; }
  static Word Put(Word word, uint32_t bits) { return (word & 0xffff) | bits; }
};

inline float Value(float x) { return x; }
inline float Value(BFloat16 x) { return FloatOf(BFloat16s::Get(x)); }

#define LEVEL_BODY "loops.inc"
#include "levels.inc"
#undef LEVEL_BODY

#define CODEC(level, Code) \
  {level::Widen<Code>, level::Round<Code>, level::RoundWith<Code>}
#define LOOPS(number, level)     \
  {number,                       \
   level::Add<float>,            \
   level::Add<BFloat16>,         \
   level::Average,               \
   {{},                          \
    CODEC(level, BFloat16s),     \
    CODEC(level, WidenedFloats), \
    CODEC(level, LowHalves),     \
    CODEC(level, HighHalves)}}

constexpr Loops kLoops[kLevels] = {
    LOOPS(0, baseline),
#if defined(__x86_64__)
    LOOPS(1, avx2),
    LOOPS(2, avx512),
#endif
};

int CountRunnable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return 1;
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has_avx512 ? 3 : 2;
#else
  return 1;
#endif
}

}  // namespace

const Loops* LoopsAt(int i) {
  static const int runnable = CountRunnable();
  return i < runnable ? &kLoops[i] : nullptr;
}

}  // namespace sparse_adam
