// Adagrad with momentum, as in `sparse_adam/rules/adagrad.py`.

#include "../power.h"
#include "../rule.h"

namespace sparse_adam {
namespace {

struct DividedByRoot {
  explicit DividedByRoot(float) {}
  LANE float operator()(float x, float by) const { return x / __builtin_sqrtf(by); }
};

struct Divided {
  explicit Divided(float) {}
  LANE float operator()(float x, float by) const { return x / by; }
};

struct TimesPower {
  explicit TimesPower(float exponent) : power(-1.0 / exponent) {}
  LANE float operator()(float x, float by) const { return power(by) * x; }
  Power power;
};

// momentum, use_nesterov, exponent, beta2, epsilon
template <typename Scaled, bool kNesterov>
struct AdagradMomentum {
  static constexpr int kSlots = 2;
  static constexpr int kRowSlots = 0;

  AdagradMomentum(const float* constants, float rate)
      : scaled(constants[2]),
        rate(rate),
        momentum(constants[0]),
        beta_2(constants[3]),
        gain(beta_2 == 1 ? 1 : 1 - beta_2),
        epsilon(constants[4]) {}

  LANE void Step(float gradient, float& w, float& a, float& m) const {
    a = beta_2 * a + gain * (gradient * gradient);
    const float step = scaled(gradient, a + epsilon);
    m = momentum * m + step;
    w = w - rate * (kNesterov ? momentum * m + step : m);
  }

  Scaled scaled;
  float rate, momentum, beta_2, gain, epsilon;
};

template <typename Scaled>
const RuleLoops& ChooseFor(const float* constants) {
  return constants[1] != 0 ? kLoopsOf<AdagradMomentum<Scaled, true>>
                           : kLoopsOf<AdagradMomentum<Scaled, false>>;
}

const RuleLoops& Choose(const float* constants) {
  const float exponent = constants[2];
  if (exponent == 2) return ChooseFor<DividedByRoot>(constants);
  return exponent == 1 ? ChooseFor<Divided>(constants)
                       : ChooseFor<TimesPower>(constants);
}

const RegisteredRule registered("AdagradMomentumRule", 5, Choose);

}  // namespace
}  // namespace sparse_adam
