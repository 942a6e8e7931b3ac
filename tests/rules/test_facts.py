"""What `check_rule` finds out of the rules that there are, and new slots of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    RowWiseAdagradRule,
    RuleFacts,
    SGDRule,
    check_rule,
    initial_slots,
)
from tests.rules.pairs import PAIRS

LOG, TANH, SUM = ("log",), ("tanh",), ("reduce_sum",)
FACTS = {
    # per_row, whole_rows, beyond_subcores, transcendentals
    "sgd": (False, False, (), 0),
    "adam": (False, False, (), 1),
    "adam_outside": (False, False, (), 1),
    "adam_ema": (False, False, (), 1),
    "adam_row": (True, False, TANH, 6),
    "amsgrad": (False, False, (), 1),
    "adagrad": (False, False, (), 1),
    "adagrad_momentum": (False, False, (), 1),
    "adagrad_momentum_nesterov": (False, False, LOG, 2),
    "adagrad_momentum_first_power": (False, False, (), 0),
    "row_wise_adagrad": (True, True, SUM, 1),
    "ftrl": (False, False, (), 2),
    "ftrl_power": (False, False, LOG, 4),
    "ftrl_multiplied": (False, False, (), 2),
}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_facts(pair):
    facts = check_rule(pair.rule)
    assert isinstance(facts, RuleFacts)
    assert FACTS[pair.name] == (
        *(facts.per_row, facts.whole_rows, facts.beyond_subcores),
        facts.transcendentals,
    )
    assert facts.flops >= 2 + facts.transcendentals


@pytest.mark.parametrize(
    "rule",
    [
        *(AdamRule(), AdamRule(bias_correction="row"), SGDRule(), AdagradRule()),
        *(AdagradMomentumRule(), RowWiseAdagradRule(), FTRLRule()),
    ],
    ids=str,
)
def test_facts_do_not_depend_on_the_numbers_of_the_defaults(rule):
    names = [pair.name for pair in PAIRS if type(pair.rule) is type(rule)]
    name = "adam_row" if getattr(rule, "bias_correction", None) else names[0]
    pair = next(pair for pair in PAIRS if pair.name == name)
    facts = check_rule(rule)
    assert (facts.per_row, facts.whole_rows, facts.beyond_subcores) == FACTS[name][:3]
    assert [slot.per for slot in rule.slots] == [slot.per for slot in pair.rule.slots]


def test_a_rule_is_traced_once():
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Counting:
        factor: float
        slots = ()

        def step(self, values, gradient, rate):
            traces.append(gradient.shape)
            return (values[0] - rate * gradient,)

    check_rule(Counting(1.0))
    once = len(traces)
    check_rule(Counting(1.0))
    assert len(traces) == once > 0
    check_rule(Counting(2.0))
    assert len(traces) == 2 * once


def test_checked_while_tracing_and_with_64_bits():
    rule = AdagradMomentumRule(momentum=0.123)

    @jax.jit
    def program(x):
        assert check_rule(rule).beyond_subcores == ()
        return x

    with jax.enable_x64(True):
        program(jnp.ones(2))
        check_rule(AdamRule(np.float64(0.625)))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_initial_slots(pair, dtype):
    table = jnp.full((4, 3), 0.75)
    made = initial_slots(pair.rule, (4, 3), dtype, table)
    for array, slot in zip(made, pair.rule.slots, strict=True):
        row = slot.per == "row"
        assert array.shape == ((4,) if row else (4, 3))
        assert array.dtype == (jnp.float32 if row else dtype)
        assert (array == (0.75 if slot.initial == "weights" else slot.initial)).all()
