// Stochastic gradient descent, as in `sparse_adam/rules/sgd.py`.

#include "../rule.h"

namespace sparse_adam {
namespace {

struct SGD {
  static constexpr int kSlots = 0;
  static constexpr int kRowSlots = 0;

  SGD(const float*, float rate) : rate(rate) {}

  LANE void Step(float gradient, float& w) const { w = w - rate * gradient; }

  float rate;
};

const RuleLoops& Choose(const float*) { return kLoopsOf<SGD>; }

const RegisteredRule registered("SGDRule", 0, Choose);

}  // namespace
}  // namespace sparse_adam
