"""Every rule of the CPU kernel, in every storage and mode, against the reference."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import rules
from sparse_adam.kernels import cpu
from sparse_adam.rules import AdagradMomentumRule, AdamRule, Limits, UpdateRule
from tests.helpers import assert_bitwise_equal
from tests.kernels.cpu.driver import driver_input
from tests.kernels.cpu.rule_update import MODES, NUM_ROWS, Numbers, RuleUpdate
from tests.rules.pairs import PAIRS, ULP, VARIANTS, Pair

RULES = (*PAIRS, *VARIANTS)
each_rule = pytest.mark.parametrize("pair", RULES, ids=str)
# Alone; and with all that wraps a rule.
WRAPPINGS = (
    (Numbers(0.75), Limits(), False),
    (Numbers(0.5, 0.125, 0.5), Limits(-2.0, 3.0, -0.75, 1.0), True),
)
# Rows of one vector and a rest; of less than one; of several.
DIMS = (20, 3, 130)


def updates_of(rule: UpdateRule) -> list[RuleUpdate]:
    """In every mode, storage and wrapping."""
    all_of = itertools.product(
        MODES, WRAPPINGS, DIMS, ("float32", "bfloat16", "mixed"), (False, True)
    )
    return [
        RuleUpdate(rule, mode, *wrapping, dim, dtypes, packed)
        for mode, wrapping, dim, dtypes, packed in all_of
        if not (packed and any(slot.per == "row" for slot in rule.slots))
    ]


def encoded(update: RuleUpdate, seeds: Any = None, **changes: Any) -> bytes:
    given = update.arrays() | changes
    given["state"] = update.stored(given["state"])
    return driver_input(
        **given, numbers=update.vector(), seeds=seeds, attributes=update.attributes()
    )


def called(update: RuleUpdate, **changes: Any) -> list[np.ndarray]:
    """The new state by the custom call, as XLA makes it."""
    given = update.arrays() | changes
    given["state"] = update.stored(given["state"])
    given["numbers"] = update.vector()
    attributes = update.attributes()

    @jax.jit
    def run(given):
        return cpu.call(**given, seeds=None, attributes=attributes)

    return [np.asarray(x) for x in run(jax.tree.map(jnp.asarray, given))]


@each_rule
def test_every_mode_and_storage(driver, pair: Pair):
    updates = updates_of(pair.rule)
    results = memoryview(driver(map(encoded, updates)))
    for update in updates:
        new = []
        for x in update.stored(update.arrays()["state"]):
            new.append(np.frombuffer(results[: x.nbytes], x.dtype).reshape(x.shape))
            results = results[x.nbytes :]
        update.check(update.restored(new), pair)
    assert not results


@each_rule
def test_blocks_threads_and_loops_do_not_change_a_bit(driver, pair: Pair):
    # Rounded sums, hot rows across blocks, noise; the driver compares.
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((700, 130)).astype(np.float32)
    ids = rng.integers(0, 5, 700).astype(np.int32)
    many = {"grads": grads, "ids": ids, "sources": np.arange(700), "gains": None}
    seeds = range(1 + len(pair.rule.slots))
    driver(
        encoded(RuleUpdate(pair.rule, mode, dim=130, dtypes=dtypes), seeds, **many)
        for mode in MODES
        for dtypes in ("float32", "bfloat16")
    )


@each_rule
def test_the_call_of_xla(pair: Pair):
    packed = [False] if pair.facts.per_row else [False, True]
    assert cpu.unsupported_rule(pair.rule) is None
    for is_packed in packed:
        for dtypes, wrapping in zip(("float32", "mixed"), WRAPPINGS, strict=True):
            update = RuleUpdate(pair.rule, "lazy", *wrapping, 20, dtypes, is_packed)
            update.check(update.restored(called(update)), pair)


def test_every_rule_of_the_package_has_a_loop():
    names = {name for name in vars(rules) if name.endswith("Rule")} - {"UpdateRule"}
    assert {pair.kind.__name__ for pair in RULES} == names
    assert cpu.library.load() == names


def test_no_loop_for_a_rule_of_a_user():
    @dataclasses.dataclass(frozen=True)
    class SignDescent:
        slots = ()

        def step(self, values, gradient, rate):
            return (values[0] - rate * jnp.sign(gradient),)

    assert cpu.unsupported_rule(SignDescent()) == (
        "its C++ library has no loop for SignDescent"
    )

    class AdamRule(SignDescent):  # not ours
        pass

    assert "has no loop for AdamRule" in str(cpu.unsupported_rule(AdamRule()))


def test_powers_are_rounded_once():
    x = np.logspace(-10, 30, 4000, dtype=np.float32).reshape(NUM_ROWS, -1)
    tiny = np.float32(2.0**-45)  # its square adds nothing
    for exponent in (0.5, 3.0, 7.5, 100.0):
        # The least that the rule takes: its power must not overflow.
        epsilon = max(1e-30, 1e-38**exponent)
        rule = AdagradMomentumRule(exponent=exponent, epsilon=epsilon)
        update = RuleUpdate(rule, dim=x.shape[1])
        _, a, m = called(
            update,
            state=[x, x, 0 * x],
            grads=np.full((1, x.shape[1]), tiny),
            ids=np.arange(NUM_ROWS, dtype=np.int32),
            sources=np.zeros(NUM_ROWS, np.int32),
        )
        assert_bitwise_equal(a, x)
        right = x.astype(np.float64) ** (-1 / exponent)
        power = np.asarray(m, np.float64) / tiny
        with np.errstate(over="ignore"):
            unit = np.spacing(right.astype(np.float32)).astype(np.float64)
        normal = (right * tiny > np.finfo(np.float32).tiny) & np.isfinite(unit)
        assert normal.mean() > 0.5
        assert (np.abs(power - right)[normal] <= 0.501 * unit[normal]).all()


@pytest.mark.parametrize("inside", [True, False])
def test_bias_correction_is_exact_at_the_first_step_and_at_any(inside):
    rule = AdamRule(0.9, 0.999, 1e-12, inside, "row")
    update = RuleUpdate(rule, numbers=Numbers(0.5), dim=4)
    steps = np.array([0, 1, 2, 3, 10, 1e3, 1e5, 2**24 - 2] * 5, np.float32)
    g = np.array([[1e-3, -7.0, 0.3, 250.0]], np.float32)
    zeros = np.zeros((NUM_ROWS, 4), np.float32)
    new = called(
        update,
        state=[zeros, zeros, zeros, steps],
        grads=g,
        ids=np.arange(NUM_ROWS, dtype=np.int32),
        sources=np.zeros(NUM_ROWS, np.int32),
    )
    w, m, v, count = (x.astype(np.float64) for x in new)
    np.testing.assert_array_equal(count, steps + 1)
    first = steps == 0
    # The first step is the rate, with the sign of the gradient.
    np.testing.assert_allclose(w[first], (-0.5 * np.sign(g)).repeat(5, 0), rtol=4 * ULP)
    wide = np.longdouble
    share_1 = 1 - wide(np.float32(0.9)) ** wide(count)
    share_2 = 1 - wide(np.float32(0.999)) ** wide(count)
    right = -0.5 * (np.sqrt(share_2) / share_1)[:, None] * m / np.sqrt(v)
    np.testing.assert_allclose(w, right.astype(np.float64), rtol=4 * ULP)


def test_a_nan_stays_in_its_row():
    for pair in RULES:
        update = RuleUpdate(pair.rule)
        given = update.arrays()
        given["ids"][5], given["grads"][5] = 7, np.nan
        new = called(update, **given)
        bad = np.asarray(np.isnan(new[0]).all(axis=1))
        assert bad[7], pair
        assert np.isnan(new[0]).sum() == update.dim, pair
        assert bad.sum() == 1, pair
