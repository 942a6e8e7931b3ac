// Adam, as in `sparse_adam/rules/adam.py`.

#include <cmath>

#include "../rule.h"

namespace sparse_adam {
namespace {

// beta_1, beta_2, epsilon, sum_inside_sqrt, bias_correction, amsgrad,
// epsilon_hat, catch_up
template <bool kSumInsideSqrt, bool kAmsgrad>
struct Adam {
  static constexpr int kSlots = kAmsgrad ? 3 : 2;
  static constexpr int kRowSlots = 0;

  Adam(const float* constants, float rate)
      : rate(rate),
        beta_1(constants[0]),
        beta_2(constants[1]),
        one_minus_beta_1(1 - beta_1),
        one_minus_beta_2(1 - beta_2),
        epsilon(kSumInsideSqrt ? constants[2] * constants[2] : constants[2]) {}

  // Of AMSGrad with the largest v, which then takes its place.
  template <typename... Largest>
  LANE void Step(float gradient, float& w, float& m, float& v,
                 Largest&... largest) const {
    m = beta_1 * m + one_minus_beta_1 * gradient;
    v = beta_2 * v + one_minus_beta_2 * gradient * gradient;
    const float second = Raised(v, largest...);
    const float root = kSumInsideSqrt ? __builtin_sqrtf(second + epsilon)
                                      : __builtin_sqrtf(second) + epsilon;
    w = w - rate * m / root;
  }

  LANE static float Raised(float v) { return v; }
  LANE static float Raised(float v, float& largest) {
    largest = largest > v ? largest : v;  // a NaN of v stays
    return largest;
  }

  float rate, beta_1, beta_2, one_minus_beta_1, one_minus_beta_2, epsilon;
};

// With the number of steps t of each row, which corrects the rate by
// sqrt(1 - beta_2**t) / (1 - beta_1**t): that of the float32 betas, so that it takes the
// factors 1 - beta of the moments away.
template <bool kSumInsideSqrt, bool kAmsgrad>
struct BiasCorrectedAdam : Adam<kSumInsideSqrt, kAmsgrad> {
  static constexpr int kRowSlots = 1;

  BiasCorrectedAdam(const float* constants, float rate)
      : Adam<kSumInsideSqrt, kAmsgrad>(constants, rate),
        corrects_epsilon(constants[6] == 0),
        log_beta_1(std::log1p(constants[0] - 1.0)),
        log_beta_2(std::log1p(constants[1] - 1.0)) {}

  LANE void BeginRow(const RowGradient&, float& steps) {
    steps += 1;
    const double m_share = -std::expm1(steps * log_beta_1);
    const double v_share = -std::expm1(steps * log_beta_2);
    this->rate *= static_cast<float>(std::sqrt(v_share) / m_share);
    if (corrects_epsilon) {
      const double factor = kSumInsideSqrt ? v_share : std::sqrt(v_share);
      this->epsilon = static_cast<float>(this->epsilon * factor);
    }
  }

  bool corrects_epsilon;
  double log_beta_1, log_beta_2;
};

// With the steps that a row has missed: the decay of them all, before the next one.
template <bool kSumInsideSqrt, bool kAmsgrad>
struct CaughtUpAdam : BiasCorrectedAdam<kSumInsideSqrt, kAmsgrad> {
  using Base = BiasCorrectedAdam<kSumInsideSqrt, kAmsgrad>;

  CaughtUpAdam(const float* constants, float rate)
      : Base(constants, rate), corrects_bias(constants[4] != 0) {}

  LANE void BeginRow(const RowGradient& gradient, float& steps) {
    const StepNumbers& n = gradient.numbers;
    const float between = n.step - 1 - steps;
    const float missed = between > 0 ? between : 0;
    kept_w = n.decays ? Kept(1.0 - n.decay, missed) : 1;
    kept_m = Kept(this->beta_1, missed);
    kept_v = Kept(this->beta_2, missed);
    steps += missed;
    if (corrects_bias) {
      Base::BeginRow(gradient, steps);
    } else {
      steps += 1;
    }
  }

  template <typename... Largest>
  LANE void Step(float gradient, float& w, float& m, float& v,
                 Largest&... largest) const {
    w = kept_w * w;
    m = kept_m * m;
    v = kept_v * v;
    Base::Step(gradient, w, m, v, largest...);
  }

  LANE static float Kept(double share, float steps) {
    return static_cast<float>(std::pow(share, static_cast<double>(steps)));
  }

  float kept_w, kept_m, kept_v;
  bool corrects_bias;
};

template <template <bool, bool> typename Kind>
const RuleLoops& ChooseOf(const float* constants) {
  const bool inside = constants[3] != 0, amsgrad = constants[5] != 0;
  if (amsgrad) {
    return inside ? kLoopsOf<Kind<true, true>> : kLoopsOf<Kind<false, true>>;
  }
  return inside ? kLoopsOf<Kind<true, false>> : kLoopsOf<Kind<false, false>>;
}

const RuleLoops& Choose(const float* constants) {
  const bool corrects = constants[4] != 0, catches_up = constants[7] != 0;
  if (catches_up) return ChooseOf<CaughtUpAdam>(constants);
  return corrects ? ChooseOf<BiasCorrectedAdam>(constants) : ChooseOf<Adam>(constants);
}

const RegisteredRule registered("AdamRule", 8, Choose);

}  // namespace
}  // namespace sparse_adam
