// Adagrad, as in `sparse_adam/rules/adagrad.py`.

#include "../rule.h"

namespace sparse_adam {
namespace {

struct Adagrad {
  static constexpr int kSlots = 1;
  static constexpr int kRowSlots = 0;

  Adagrad(const float*, float rate) : rate(rate) {}

  LANE void Step(float gradient, float& w, float& a) const {
    a = a + gradient * gradient;
    w = w - rate * gradient / __builtin_sqrtf(a);
  }

  float rate;
};

const RuleLoops& Choose(const float*) { return kLoopsOf<Adagrad>; }

const RegisteredRule registered("AdagradRule", 1, Choose);

}  // namespace
}  // namespace sparse_adam
