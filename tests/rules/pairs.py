"""Every rule with numbers that are not its defaults, and its step in the reference.

Tests of other folders run over `PAIRS`, so that a rule that is added here is tested on
every kernel:

    @pytest.mark.parametrize("pair", PAIRS, ids=str)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_adam.check import compare
from sparse_adam.reference import (
    RowStep,
    adagrad,
    adagrad_momentum,
    adam,
    ftrl,
    row_wise_adagrad,
    sgd,
)
from sparse_adam.reference import WithEMA as ReferenceWithEMA
from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    RowWiseAdagradRule,
    RuleFacts,
    SGDRule,
    UpdateRule,
    WithEMA,
    check_rule,
)

ULP = compare.ULP


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A rule, and the step of the reference that it must make."""

    name: str
    rule: UpdateRule
    step: RowStep

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> type:
        """The class of the rule, without a moving average beside it."""
        return type(self.rule.rule if isinstance(self.rule, WithEMA) else self.rule)

    @property
    def facts(self) -> RuleFacts:
        """What the kernels ask of the rule."""
        return check_rule(self.rule)

    def state(self, num_rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """Returns a float32 table and slots as they are after some steps.

        Slots are `[V, D]`, or `[V]` where they are per row.
        """
        rng = np.random.default_rng((seed, num_rows, dim))
        arrays: list[np.ndarray] = [rng.standard_normal((num_rows, dim))]
        for slot in self.rule.slots:
            shape = (num_rows,) if slot.per == "row" else (num_rows, dim)
            if slot.name in ("velocities", "maxima", "accumulators"):
                arrays.append(rng.uniform(0.25, 4, shape))
            elif slot.name == "steps":
                arrays.append(rng.integers(0, 50, shape))
            else:
                arrays.append(rng.standard_normal(shape))
        return tuple(x.astype(np.float32) for x in arrays)

    def expected(
        self, state: Any, gradient: Any, rate: float
    ) -> tuple[np.ndarray, ...]:
        """Returns the reference's step of every row, in float64."""
        rows = [
            self.step(
                tuple(x[i].astype(np.float64) for x in state),
                gradient[i].astype(np.float64),
                np.float64(np.float32(rate)),
            )
            for i in range(len(gradient))
        ]
        return tuple(np.stack(x) for x in zip(*rows, strict=True))

    def tolerance(self, state: Any, gradient: Any, rate: float) -> tuple[Any, ...]:
        """Returns how far a float32 step may be off, for each value.

        It is some roundings of what goes in and what comes out, and of what they do on
        the way.
        """

        def update(state: Any, gradient: Any) -> tuple[np.ndarray, ...]:
            return self.expected(state, gradient, rate)

        _, bounds = self.roundings(update, state, gradient, rate)
        return tuple(compare.ROUNDINGS * bound for bound in bounds)

    def roundings(
        self, update: Callable[[Any, Any], Any], state: Any, gradient: Any, rate: float
    ) -> tuple[Any, list[np.ndarray]]:
        """Returns what `update` gives, and how far roundings move it."""
        return compare.roundings(self.rule, update, state, gradient, rate)


def _pair(name: str, rule: Any, step: Any, **numbers: Any) -> Pair:
    """Makes a pair of a class of rules and a step that take the same numbers."""
    return Pair(name, rule(**numbers), step(**numbers))


def _with_accumulator(
    name: str, rule: Any, step: Any, initial: float, **numbers: Any
) -> Pair:
    """Makes a pair of which only the rule takes the initial accumulator value."""
    made = rule(initial_accumulator_value=initial, **numbers)
    return Pair(name, made, step(**numbers))


PAIRS = (
    _pair("sgd", SGDRule, sgd),
    _pair("adam", AdamRule, adam, beta_1=0.8, beta_2=0.95, epsilon=0.125),
    _pair(
        "adam_outside",
        AdamRule,
        adam,
        beta_1=0.8,
        beta_2=0.95,
        epsilon=0.125,
        sum_inside_sqrt=False,
    ),
    _pair(
        "adam_row",
        AdamRule,
        adam,
        beta_1=0.85,
        beta_2=0.9975,
        epsilon=0.0625,
        bias_correction="row",
    ),
    _pair(
        "amsgrad",
        AdamRule,
        adam,
        beta_1=0.8,
        beta_2=0.75,
        epsilon=0.125,
        amsgrad=True,
    ),
    _with_accumulator("adagrad", AdagradRule, adagrad, 0.375),
    _pair(
        "adagrad_momentum",
        AdagradMomentumRule,
        adagrad_momentum,
        momentum=0.75,
        beta2=0.875,
        epsilon=0.01,
    ),
    _pair(
        "adagrad_momentum_nesterov",
        AdagradMomentumRule,
        adagrad_momentum,
        momentum=0.6,
        use_nesterov=True,
        exponent=3.0,
        epsilon=1e-3,
    ),
    _pair(
        "adagrad_momentum_first_power",
        AdagradMomentumRule,
        adagrad_momentum,
        momentum=0.5,
        exponent=1.0,
        epsilon=0.125,
    ),
    _with_accumulator(
        "row_wise_adagrad", RowWiseAdagradRule, row_wise_adagrad, 0.25, epsilon=0.125
    ),
    _with_accumulator(
        "ftrl",
        FTRLRule,
        ftrl,
        0.375,
        l1_regularization_strength=0.5,
        l2_regularization_strength=0.25,
        beta=0.125,
    ),
    _with_accumulator(
        "ftrl_power",
        FTRLRule,
        ftrl,
        0.5,
        learning_rate_power=-0.75,
        l2_regularization_strength=0.125,
    ),
    _with_accumulator(
        "ftrl_multiplied",
        FTRLRule,
        ftrl,
        0.25,
        l1_regularization_strength=2.0,
        l2_regularization_strength=0.5,
        beta=0.25,
        multiply_linear_by_learning_rate=True,
    ),
    Pair(
        "adam_ema",
        WithEMA(AdamRule(0.8, 0.95, 0.125), 0.625),
        ReferenceWithEMA(adam(0.8, 0.95, 0.125), 0.625),
    ),
)
# Other numbers, for which a kernel may have instructions of their own.
VARIANTS = (
    _pair(
        "amsgrad_outside",
        AdamRule,
        adam,
        beta_1=0.5,
        beta_2=0.75,
        epsilon=1e-3,
        sum_inside_sqrt=False,
        amsgrad=True,
    ),
    _pair(
        "amsgrad_row",
        AdamRule,
        adam,
        beta_1=0.75,
        beta_2=0.875,
        epsilon=0.125,
        bias_correction="row",
        amsgrad=True,
        epsilon_hat=False,
    ),
    _pair(
        "amsgrad_row_outside",
        AdamRule,
        adam,
        beta_1=0.75,
        beta_2=0.875,
        epsilon=0.125,
        sum_inside_sqrt=False,
        bias_correction="row",
        amsgrad=True,
        epsilon_hat=False,
    ),
    _pair(
        "adam_row_outside",
        AdamRule,
        adam,
        beta_1=0.5,
        beta_2=0.75,
        epsilon=1e-3,
        sum_inside_sqrt=False,
        bias_correction="row",
    ),
    _pair(
        "adagrad_momentum_nesterov_square_root",
        AdagradMomentumRule,
        adagrad_momentum,
        momentum=0.5,
        use_nesterov=True,
        beta2=0.9,
        epsilon=1e-3,
    ),
    _pair(
        "adagrad_momentum_nesterov_decaying",
        AdagradMomentumRule,
        adagrad_momentum,
        momentum=0.5,
        use_nesterov=True,
        exponent=3.0,
        beta2=0.75,
    ),
    _pair("ftrl_without_penalties", FTRLRule, ftrl),
    _with_accumulator(
        "ftrl_power_multiplied",
        FTRLRule,
        ftrl,
        0.1,
        learning_rate_power=-0.25,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.1,
        beta=1.0,
        multiply_linear_by_learning_rate=True,
    ),
)
