// How an update rule is written in C++: one file in `rules/`, which holds the step of
// one lane and nothing else. `rules/sgd.cc` is the shortest.
//
// A rule is a struct:
//
//   template <bool kNesterov>
//   struct Momentum {
//     static constexpr int kSlots = 1;     // slots of one number for each weight
//     static constexpr int kRowSlots = 0;  // slots of one number for each row
//
//     // Made once for each update. The constants are the fields of the Python
//     // dataclass, in order: a bool is 0 or 1, None is 0, a string is 1.
//     Momentum(const float* constants, float rate) : rate(rate), mu(constants[0]) {}
//
//     // Called for each weight, with its gradient (scaled and clipped), the weight
//     // (decayed already, and clipped afterwards) and its slots in order.
//     LANE void Step(float gradient, float& w, float& m) const {
//       m = mu * m + gradient;
//       w = w - rate * (kNesterov ? mu * m + gradient : m);
//     }
//
//     float rate, mu;
//   };
//
// A rule with `kRowSlots` has a second function. It is called before the lanes of each
// row, on a copy of the rule that is of this row, with the slots of the row:
//
//   LANE void BeginRow(const RowGradient& gradient, float& sum);
//
// The last lines of the file name the Python class, say how many constants it has, and
// choose the loop. What does not change within an update (`kNesterov`) is a template
// argument, so that the loop over lanes has no branch:
//
//   const RuleLoops& Choose(const float* constants) {
//     return constants[1] ? kLoopsOf<Momentum<true>> : kLoopsOf<Momentum<false>>;
//   }
//   const RegisteredRule registered("MomentumRule", 2, Choose);
//
// The loop is compiled for each instruction set (rule.inc). To give the same bits on all
// of them a rule may use float32 arithmetic, comparisons that choose between values,
// __builtin_sqrtf and `Power`, and in BeginRow also double and the C library.

#ifndef SPARSE_ADAM_RULE_H_
#define SPARSE_ADAM_RULE_H_

#include <cstddef>
#include <cstdint>
#include <new>
#include <string_view>
#include <type_traits>
#include <utility>

#include "loops.h"

// A function that becomes part of the loop that calls it, whose instruction set it then
// uses.
#define LANE [[gnu::always_inline]] inline

namespace sparse_adam {

// What wraps the step of every rule. An open side of a clip is an infinity.
struct StepNumbers {
  bool decays;
  float decay;           // share of the weights, if they decay
  float gradient_scale;  // 1 for none
  float gradient_min;
  float gradient_max;
  float weight_min;
  float weight_max;
  float ema_share;  // of the new weights in their average, the last slot; 0 for none
  float step;  // its number, from 1, where rows catch up
};

// A comparison with a NaN is false, so a NaN stays.
LANE float Clip(float x, float low, float high) {
  const float raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// The gradient of a lane. Most updates have neither decay nor scale (`kScales`), and
// narrow rows notice two numbers more.
template <bool kScales>
LANE float GradientOf(float summed, const StepNumbers& n) {
  const float scaled = kScales ? n.gradient_scale * summed : summed;
  return Clip(scaled, n.gradient_min, n.gradient_max);
}

// The gradient of a whole row, scaled and clipped.
struct RowGradient {
  const float* summed;
  int64_t size;  // D
  const StepNumbers& numbers;

  // Adds up squares in an order that depends on the size only: lane i belongs to sum
  // i modulo 16, and these are added up in pairs.
  LANE float MeanOfSquares() const {
    constexpr int kSums = 16;
    const StepNumbers own = numbers;
    float sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= size; i += kSums) {
      for (int k = 0; k < kSums; ++k) {
        const float g = GradientOf<true>(summed[i + k], own);
        sums[k] += g * g;
      }
    }
    for (int k = 0; i + k < size; ++k) {
      const float g = GradientOf<true>(summed[i + k], own);
      sums[k] += g * g;
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0] / static_cast<float>(size);
  }
};

// Room for a rule of any kind.
struct alignas(8) PreparedRule {
  unsigned char bytes[64];
};

// Steps `rows` rows of `dim` lanes that stand together: values are the weights and the
// slots of these rows, row_values the slots of one number for each row. None overlap.
using StepFunction = void (*)(const PreparedRule& prepared, const StepNumbers& numbers,
                              float* const* values, float* const* row_values,
                              const float* gradient, int64_t rows, int64_t dim);

// What the update calls of a rule.
struct RuleLoops {
  int slots;
  int row_slots;
  PreparedRule (*prepare)(const float* constants, float rate);
  // By instruction set; and for updates without and with a decay or a scale.
  StepFunction steps[kLevels][2];
};

#define LEVEL_BODY "rule.inc"
#include "levels.inc"
#undef LEVEL_BODY

template <typename Rule>
PreparedRule Prepare(const float* constants, float rate) {
  static_assert(sizeof(Rule) <= sizeof(PreparedRule), "make PreparedRule larger");
  static_assert(alignof(Rule) <= alignof(PreparedRule), "align PreparedRule more");
  static_assert(std::is_trivially_copyable_v<Rule>, "a rule is copied as bytes");
  PreparedRule prepared = {};
  new (prepared.bytes) Rule(constants, rate);
  return prepared;
}

#define STEPS(level) {level::StepRows<Rule, false>, level::StepRows<Rule, true>}

template <typename Rule>
constexpr RuleLoops kLoopsOf = {
    Rule::kSlots,
    Rule::kRowSlots,
    Prepare<Rule>,
    {
        STEPS(baseline),
#if defined(__x86_64__)
        STEPS(avx2),
        STEPS(avx512),
#endif
    },
};

#undef STEPS

// A rule as it is found by the name of its Python class. Each file of a rule has one,
// which adds itself to the list when the library is loaded.
class RegisteredRule {
 public:
  using Choose = const RuleLoops& (*)(const float* constants);

  RegisteredRule(const char* name, int num_constants, Choose choose);

  static const RegisteredRule* First();
  static const RegisteredRule* Find(std::string_view name);  // null for none

  const RegisteredRule* next() const { return next_; }
  const char* name() const { return name_; }
  int num_constants() const { return num_constants_; }
  const RuleLoops& LoopsFor(const float* constants) const { return choose_(constants); }

 private:
  const char* name_;
  int num_constants_;
  Choose choose_;
  const RegisteredRule* next_;
};

}  // namespace sparse_adam

#endif  // SPARSE_ADAM_RULE_H_
