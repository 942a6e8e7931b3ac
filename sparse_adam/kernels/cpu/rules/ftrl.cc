// FTRL-proximal, as in `sparse_adam/rules/ftrl.py`.

#include "../power.h"
#include "../rule.h"

namespace sparse_adam {
namespace {

struct SquareRoot {
  explicit SquareRoot(float) {}
  LANE float operator()(float x) const { return __builtin_sqrtf(x); }
};

// learning_rate_power, l1_regularization_strength, l2_regularization_strength, beta,
// initial_accumulator_value, multiply_linear_by_learning_rate
template <typename PowerOf, bool kTimesRate>
struct FTRL {
  static constexpr int kSlots = 2;
  static constexpr int kRowSlots = 0;

  FTRL(const float* constants, float rate)
      : power_of(-constants[0]),
        rate(rate),
        l1(kTimesRate ? rate * constants[1] : constants[1]),
        twice_l2(kTimesRate ? rate * (2 * constants[2]) : 2 * constants[2]),
        beta(constants[3]) {}

  LANE void Step(float gradient, float& w, float& a, float& linear) const {
    const float grown = a + gradient * gradient;
    const float power = power_of(grown);
    const float pull = (power - power_of(a)) * w;
    a = grown;
    linear = kTimesRate ? linear + rate * gradient - pull
                        : linear + gradient - pull / rate;
    const float curvature =
        kTimesRate ? power + twice_l2 + beta : (power + beta) / rate + twice_l2;
    w = (Clip(linear, -l1, l1) - linear) / curvature;
  }

  PowerOf power_of;
  float rate, l1, twice_l2, beta;
};

const RuleLoops& Choose(const float* constants) {
  const bool times_rate = constants[5] != 0;
  if (constants[0] == -0.5f) {
    return times_rate ? kLoopsOf<FTRL<SquareRoot, true>>
                      : kLoopsOf<FTRL<SquareRoot, false>>;
  }
  return times_rate ? kLoopsOf<FTRL<Power, true>> : kLoopsOf<FTRL<Power, false>>;
}

const RegisteredRule registered("FTRLRule", 6, Choose);

}  // namespace
}  // namespace sparse_adam
