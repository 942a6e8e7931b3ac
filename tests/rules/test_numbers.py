"""Numbers that a rule refuses: every error names argument and value, and a way out."""

import dataclasses
import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    Limits,
    RowWiseAdagradRule,
    SGDRule,
    Slot,
    check_rule,
    numbers,
)

NAN, INF = float("nan"), float("inf")
NOT_POSITIVE = (
    (0.0, "={value} must be positive"),
    (-1e-3, "={value} must be positive"),
    (NAN, "={value} must be positive"),
    (INF, "={value} must be finite"),
    (1e39, "={value} overflows float32: pass at most 3.4e38"),
    (1e-39, "={value} underflows float32: pass at least 1.2e-38"),
)
NEGATIVE = (
    (-1e-3, "={value} must be >= 0"),
    (NAN, "={value} must be finite"),
    (-INF, "={value} must be finite"),
    (1e39, "={value} overflows float32: pass at most 3.4e38"),
)
NO_BETA = (
    (-0.1, "={value} must be >= 0 and < 1"),
    (1.0, "={value} must be >= 0 and < 1"),
    (NAN, "={value} must be >= 0 and < 1"),
    (0.99999999, "={value} is 1 in float32: pass at most 0.9999999"),
)
BIAS_CORRECTED = functools.partial(AdamRule, bias_correction="row", epsilon_hat=False)
OUT_OF_RANGE = [
    *((AdamRule, "beta_1", *case) for case in NO_BETA),
    *((AdamRule, "beta_2", *case) for case in NO_BETA),
    *((AdamRule, "epsilon", *case) for case in NOT_POSITIVE[:-1]),
    (AdamRule, "epsilon", 1e-19, r"={value}: epsilon\*\*2 underflows .* least 1.1e-19"),
    (AdamRule, "epsilon", 1e20, r"={value}: epsilon\*\*2 overflows .* most 1.8e19"),
    (AdamRule, "bias_correction", "all", "='{value}' must be None or 'row'; for one"),
    (AdamRule, "bias_correction", True, "={value} must be None or 'row'"),
    (AdamRule, "epsilon_hat", False, "={value} .*: pass bias_correction='row'"),
    (BIAS_CORRECTED, "epsilon", 1e-18, "={value} underflows .* or epsilon_hat=True"),
    *((AdagradRule, "initial_accumulator_value", *case) for case in NOT_POSITIVE),
    *((AdagradMomentumRule, "momentum", *case) for case in NEGATIVE),
    *((AdagradMomentumRule, "exponent", *case) for case in NOT_POSITIVE),
    *((AdagradMomentumRule, "epsilon", *case) for case in NOT_POSITIVE),
    (AdagradMomentumRule, "beta2", 0.0, "={value} must be > 0 and <= 1"),
    (AdagradMomentumRule, "beta2", 1.5, "={value} must be > 0 and <= 1"),
    (AdagradMomentumRule, "beta2", NAN, "={value} must be > 0 and <= 1"),
    (AdagradMomentumRule, "beta2", 0.99999999, "={value} is 1 in float32.* 0.9999999"),
    (
        AdagradMomentumRule,
        "exponent",
        0.25,
        r"={value}: epsilon\*\*\(-1 / exponent\) overflows .* larger epsilon or exp",
    ),
    *((RowWiseAdagradRule, "epsilon", *case) for case in NOT_POSITIVE),
    *((RowWiseAdagradRule, "initial_accumulator_value", *case) for case in NEGATIVE),
    (FTRLRule, "learning_rate_power", 0.5, "={value} must be <= 0"),
    (FTRLRule, "learning_rate_power", NAN, "={value} must be finite"),
    (FTRLRule, "learning_rate_power", -INF, "={value} must be finite"),
    *((FTRLRule, "l1_regularization_strength", *case) for case in NEGATIVE),
    *((FTRLRule, "l2_regularization_strength", *case) for case in NEGATIVE),
    *((FTRLRule, "beta", *case) for case in NEGATIVE),
    *((FTRLRule, "initial_accumulator_value", *case) for case in NOT_POSITIVE),
]
RULES: Any = (AdamRule, AdagradRule, AdagradMomentumRule, RowWiseAdagradRule, FTRLRule)
FIELDS = [(rule, field) for rule in RULES for field in dataclasses.fields(rule)]
FLOATS = [(rule, f.name) for rule, f in FIELDS if isinstance(f.default, float)]
FLAGS = [(rule, f.name) for rule, f in FIELDS if isinstance(f.default, bool)]


@pytest.mark.parametrize(("rule", "name", "value", "match"), OUT_OF_RANGE)
def test_numbers_out_of_range(rule, name, value, match):
    match = name + match.replace("{value}", re.escape(f"{value}"))
    with pytest.raises(ValueError, match=match):
        rule(**{name: value})


def test_every_number_is_out_of_range_somewhere():
    tried = {(rule, name) for rule, name, *_ in OUT_OF_RANGE}
    assert tried >= set(FLOATS)
    assert not dataclasses.fields(SGDRule)


@pytest.mark.parametrize(("rule", "name"), FLOATS)
@pytest.mark.parametrize("value", ["0.5", None, True, np.ones(1), 0.5j, [0.5]], ids=str)
def test_no_numbers(rule, name, value):
    with pytest.raises(TypeError, match=f"{name}=.* must be a number"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name"), FLOATS)
def test_traced_numbers(rule, name):
    with pytest.raises(TypeError, match=f"{name} is traced; only .* Python number"):
        jax.jit(lambda x: rule(**{name: x}).slots)(0.5)


@pytest.mark.parametrize(("rule", "name"), FLAGS)
@pytest.mark.parametrize("value", [1, None, "yes", np.ones(1, bool)], ids=str)
def test_no_flags(rule, name, value):
    with pytest.raises(TypeError, match=f"{name}=.* must be True or False"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name"), FLOATS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, jnp.float32])
def test_scalars_of_numpy_and_jax_are_numbers(rule, name, kind):
    value = -0.5 if name == "learning_rate_power" else 0.5
    made, plain = rule(**{name: kind(value)}), rule(**{name: value})
    assert made == plain
    assert hash(made) == hash(plain)
    assert type(getattr(made, name)) is float
    assert check_rule(made) is check_rule(plain)


@pytest.mark.parametrize(("rule", "name"), FLAGS)
def test_numpy_flags_are_flags(rule, name):
    assert getattr(rule(**{name: np.bool_(True)}), name) is True


def test_whole_numbers_are_numbers():
    assert AdagradMomentumRule(exponent=3, beta2=1) == AdagradMomentumRule(exponent=3.0)
    assert FTRLRule(beta=1, learning_rate_power=0) == FTRLRule(0.0, beta=1.0)


def test_numbers_at_the_edge_are_taken():
    AdamRule(0.0, 0.0, 1.1e-19)
    AdamRule(0.9999999, 0.9999999, 1.2e-38, sum_inside_sqrt=False)
    AdamRule(epsilon=1.8e19)
    AdagradRule(3.4e38)
    AdagradMomentumRule(beta2=0.9999999, epsilon=1e-19, exponent=0.5)
    RowWiseAdagradRule(1.2e-38, 0.0)
    FTRLRule(-0.0, initial_accumulator_value=1.2e-38)


def test_rules_are_frozen():
    for rule in (*RULES, SGDRule):
        for field in dataclasses.fields(rule):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(rule(), field.name, 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("",), ValueError, "name='' of a slot must be a non-empty string"),
        ((3,), ValueError, "name=3 of a slot must be a non-empty string"),
        (("a", 0.0, "table"), ValueError, "per='table' must be 'element' or 'row'"),
        (("a", NAN), ValueError, "initial=nan must be finite"),
        (("a", 1e39), ValueError, "initial=1e[+]39 overflows float32"),
        (("a", "zeros"), TypeError, "initial='zeros' must be a number"),
    ],
)
def test_slots(arguments, error, match):
    with pytest.raises(error, match=match):
        Slot(*arguments)


def test_slots_of_equal_numbers_are_equal():
    of_numpy: Any = np.float32(0.5)
    assert Slot("a", of_numpy) == Slot("a", 0.5)
    assert hash(Slot("a", jnp.float32(0.5))) == hash(Slot("a", 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1.0, None, None), ValueError, r"clipvalue=-1.0 must be >= 0, or a pair"),
        ((NAN, None, None), ValueError, r"clipvalue=nan must be >= 0"),
        (((1.0,), None, None), ValueError, r"clipvalue=\(1.0,\) must be a number or a"),
        (
            ([0, 1], None, None),
            TypeError,
            r"clipvalue=\[0, 1\] must be a number.*\(0, 1\)",
        ),
        (((2, 1), None, None), ValueError, r"clipvalue\[0\]=2.0 is above .*exchange"),
        (((None, NAN), None, None), ValueError, r"clipvalue\[1\]=nan must be a number"),
        ((("a", 1), None, None), TypeError, r"clipvalue\[0\]='a' must be a number"),
        ((None, 2, 1), ValueError, "clip_weight_min=2.0 is above clip_weight_max=1.0"),
        ((None, NAN, 1), ValueError, "clip_weight_min=nan must be a number, or None"),
        ((None, None, 1e39), ValueError, "clip_weight_max=1e[+]39 overflows.* None"),
        ((1e39, None, None), ValueError, "clipvalue=-?1e[+]39 overflows float32"),
    ],
)
def test_limits(arguments, error, match):
    with pytest.raises(error, match=match):
        Limits.of(*arguments)


def test_limits_of_numbers():
    assert Limits.of(2, None, None) == Limits(-2.0, 2.0)
    assert Limits.of((None, 1), -1, INF) == Limits(None, 1.0, -1.0, INF)
    assert Limits.of(0.0, None, None) == Limits(0.0, 0.0)
    assert Limits.of(None, None, None) == Limits()


@pytest.mark.parametrize("value", [NAN, INF, 1e39, np.float32(NAN), np.float64(-1e39)])
def test_scalars_that_are_not_finite(value):
    with pytest.raises(ValueError, match=r"rate=.* (must be finite|overflows float32)"):
        numbers.scalar("rate", value)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (lambda step: 0.1, TypeError, r"is a callable: pass its value, rate=schedule"),
        ("fast", TypeError, "rate='fast' must be a real number"),
        (True, TypeError, "rate=True must be a real number"),
        (np.ones(2), ValueError, r"rate has shape \(2,\) but one update has one"),
    ],
)
def test_no_scalars(value, error, match):
    with pytest.raises(error, match=match):
        numbers.scalar("rate", value)


def test_scalars():
    for value in (0.5, np.float64(0.5), np.array(0.5), jnp.float32(0.5)):
        assert numbers.scalar("rate", value) == 0.5
    assert jax.jit(lambda x: numbers.scalar("rate", x))(3).dtype == jnp.float32


def test_numbers_never_overflow_on_the_way():
    """No warning of NumPy comes before the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule, name in FLOATS:
            with pytest.raises(ValueError, match=name):
                rule(**{name: 1e300})
