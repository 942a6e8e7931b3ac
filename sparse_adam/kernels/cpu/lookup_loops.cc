#include "lookup_loops.h"

#include <cstring>

namespace sparse_adam {
namespace {

constexpr int64_t kCacheLine = 64;  // bytes
constexpr int kLocality = 2;         // the second-level cache
// The processor sees it coming when more than this is read.
constexpr int64_t kMostBytesAsked = 8 * kCacheLine;
constexpr int64_t kMostOtherLines = 8;

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// How a weight stands in a word: the bits of a float32 are (word << kShift) & kMask.
template <typename Item, int shift, uint32_t mask>
struct Code {
  using Word = Item;
  static constexpr int kShift = shift;
  static constexpr uint32_t kMask = mask;
  static uint32_t Get(Word word) { return static_cast<uint32_t>(word) << shift & mask; }
};
using Float32s = Code<uint32_t, 0, 0xffffffff>;  // widened bfloat16, too
using BFloat16s = Code<BFloat16, 16, 0xffffffff>;
using LowHalves = Code<uint32_t, 16, 0xffffffff>;
using HighHalves = Code<uint32_t, 0, 0xffff0000>;

#define LEVEL baseline
#define TARGET
#define VECTOR 16
#include "lookup_loops.inc"
#undef LEVEL
#undef TARGET
#undef VECTOR

#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2")))
#define VECTOR 32
#include "lookup_loops.inc"
#undef LEVEL
#undef TARGET
#undef VECTOR

#define LEVEL avx512
#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define VECTOR 64
#include "lookup_loops.inc"
#undef LEVEL
#undef TARGET
#undef VECTOR
#endif

// In the order of `Encoding`.
#define COMBINE(level)                                                  \
  {level::CombineBoth<Float32s>, level::CombinePlain<BFloat16s>,        \
   level::CombineBoth<Float32s>, level::CombinePacked<LowHalves>,       \
   level::CombinePacked<HighHalves>}
#define COPY(level, To)                                             \
  {level::CopyRows<Float32s, To>, level::CopyRows<BFloat16s, To>,   \
   level::CopyRows<Float32s, To>, level::CopyRows<LowHalves, To>,   \
   level::CopyRows<HighHalves, To>}
#define LOOPS(level) {COMBINE(level), COPY(level, uint32_t), COPY(level, BFloat16)}

constexpr LookupLoops kLoops[] = {
    LOOPS(baseline),
#if defined(__x86_64__)
    LOOPS(avx2),
    LOOPS(avx512),
#endif
};

}  // namespace

const LookupLoops* LookupLoopsAt(int i) {
  return LoopsAt(i) == nullptr ? nullptr : &kLoops[i];
}

}  // namespace sparse_adam
