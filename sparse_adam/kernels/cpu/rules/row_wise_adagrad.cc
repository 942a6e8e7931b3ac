// Adagrad with one number for each row, as in `sparse_adam/rules/adagrad.py`.

#include "../rule.h"

namespace sparse_adam {
namespace {

// epsilon, initial_accumulator_value
struct RowWiseAdagrad {
  static constexpr int kSlots = 0;
  static constexpr int kRowSlots = 1;

  RowWiseAdagrad(const float* constants, float rate)
      : rate(rate), epsilon(constants[0]) {}

  LANE void BeginRow(const RowGradient& gradient, float& a) {
    a = a + gradient.MeanOfSquares();
    rate = rate / (__builtin_sqrtf(a) + epsilon);
  }

  LANE void Step(float gradient, float& w) const { w = w - rate * gradient; }

  float rate, epsilon;
};

const RuleLoops& Choose(const float*) { return kLoopsOf<RowWiseAdagrad>; }

const RegisteredRule registered("RowWiseAdagradRule", 2, Choose);

}  // namespace
}  // namespace sparse_adam
