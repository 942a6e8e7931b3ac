// Adam, as in `sparse_adam/rules/adam.py`.

#include <cmath>

#include "../rule.h"

namespace sparse_adam {
namespace {

// beta_1, beta_2, epsilon, sum_inside_sqrt, bias_correction
template <bool kSumInsideSqrt>
struct Adam {
  static constexpr int kSlots = 2;
  static constexpr int kRowSlots = 0;

  Adam(const float* constants, float rate)
      : rate(rate),
        beta_1(constants[0]),
        beta_2(constants[1]),
        one_minus_beta_1(1 - beta_1),
        one_minus_beta_2(1 - beta_2),
        epsilon(kSumInsideSqrt ? constants[2] * constants[2] : constants[2]) {}

  LANE void Step(float gradient, float& w, float& m, float& v) const {
    m = beta_1 * m + one_minus_beta_1 * gradient;
    v = beta_2 * v + one_minus_beta_2 * gradient * gradient;
    const float root =
        kSumInsideSqrt ? __builtin_sqrtf(v + epsilon) : __builtin_sqrtf(v) + epsilon;
    w = w - rate * m / root;
  }

  float rate, beta_1, beta_2, one_minus_beta_1, one_minus_beta_2, epsilon;
};

// With the number of steps t of each row, which corrects the rate by
// sqrt(1 - beta_2**t) / (1 - beta_1**t): that of the float32 betas, so that it takes the
// factors 1 - beta of the moments away.
template <bool kSumInsideSqrt>
struct BiasCorrectedAdam : Adam<kSumInsideSqrt> {
  static constexpr int kRowSlots = 1;

  BiasCorrectedAdam(const float* constants, float rate)
      : Adam<kSumInsideSqrt>(constants, rate),
        log_beta_1(std::log1p(constants[0] - 1.0)),
        log_beta_2(std::log1p(constants[1] - 1.0)) {}

  LANE void BeginRow(const RowGradient&, float& steps) {
    steps += 1;
    const double m_share = -std::expm1(steps * log_beta_1);
    const double v_share = -std::expm1(steps * log_beta_2);
    this->rate *= static_cast<float>(std::sqrt(v_share) / m_share);
  }

  double log_beta_1, log_beta_2;
};

const RuleLoops& Choose(const float* constants) {
  const bool inside = constants[3] != 0, corrects = constants[4] != 0;
  if (corrects) {
    return inside ? kLoopsOf<BiasCorrectedAdam<true>>
                  : kLoopsOf<BiasCorrectedAdam<false>>;
  }
  return inside ? kLoopsOf<Adam<true>> : kLoopsOf<Adam<false>>;
}

const RegisteredRule registered("AdamRule", 5, Choose);

}  // namespace
}  // namespace sparse_adam
