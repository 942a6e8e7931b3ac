#include "loops.h"

#include <cstring>

namespace sparse_adam {
namespace {

inline float Widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float widened;
  std::memcpy(&widened, &bits, sizeof(widened));
  return widened;
}

inline BFloat16 Rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const uint32_t quiet_nan = bits | 0x00400000;
  return static_cast<BFloat16>((x != x ? quiet_nan : rounded) >> 16);
}

// A comparison with a NaN is false, so a NaN stays.
inline float Clip(float x, float low, float high) {
  const float raised = x < low ? low : x;
  return raised > high ? high : raised;
}

#define LEVEL baseline
#define TARGET
#include "loops.inc"
#undef LEVEL
#undef TARGET

#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2")))
#include "loops.inc"
#undef LEVEL
#undef TARGET

#define LEVEL avx512
#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#include "loops.inc"
#undef LEVEL
#undef TARGET
#endif

#define LOOPS(level) \
  {#level, level::Add, level::AddBFloat16, level::Step, level::Widen, level::Round}

constexpr Loops kLoops[] = {
    LOOPS(baseline),
#if defined(__x86_64__)
    LOOPS(avx2),
    LOOPS(avx512),
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
