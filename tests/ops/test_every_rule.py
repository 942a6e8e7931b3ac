"""Every rule on every implementation, in both storages, against the reference."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, reference, sparse_update
from sparse_adam.ops import dispatch
from tests.helpers import assert_bitwise_equal
from tests.rules.pairs import PAIRS, ULP

V, N, RATE = 40, 24, 0.125
WRAPPED = {
    "clipvalue": 1.5,
    "clip_weight_max": 0.75,
    "weight_decay_factor": 0.25,
    "gradient_scale": 0.5,
}
QUICK = ("cpu", "xla")  # to compile; an interpreted kernel takes seconds
# One of each kind of rule: no slot, one, two, of rows, of both, and an average; and
# three slots, packed.
FEW = ("sgd", "adagrad_momentum", "ftrl", "adam_row", "row_wise_adagrad", "adam_ema")
FEW_PACKED = (*FEW, "amsgrad")


def batch(dim, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, V + 2, N).astype(np.int32)
    # Sums of these are exact.
    return ids, (rng.integers(-16, 17, (N, dim)) / 8).astype(np.float32)


def check(pair, implementation, packed, options, dim):
    state = pair.state(V, dim)
    ids, grads = batch(dim)
    stored = tuple(map(jnp.asarray, state))
    if packed:
        stored = PackedTable.pack(*stored)
    update = functools.partial(
        sparse_update, rule=pair.rule, learning_rate=RATE, **options
    )
    new = jax.jit(functools.partial(update, implementation=implementation))(
        stored, ids, grads
    )
    new = new.unpack() if packed else new
    expected = reference.sparse_update(
        state, ids, grads, pair.step, learning_rate=RATE, **options
    )
    touched = np.isin(np.arange(V), ids)
    if not options.get("lazy", True):
        touched[:] = True
    steps = 8 if options.get("use_gradient_accumulation", True) is False else 1
    for x, old, right in zip(new, state, expected, strict=True):
        assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])
        size = np.abs(right) + np.abs(old) + 4
        wrong = np.abs(np.asarray(x) - right) > 64 * steps * ULP * size
        assert not wrong.any(), np.argwhere(wrong)[:3]


def unsupported(pair, implementation, packed, options, dim=128):
    """Why an implementation refuses, asked by the op; None where it does not."""
    state = tuple(map(jnp.asarray, pair.state(V, dim)))
    ids, grads = batch(dim)
    try:
        stored = PackedTable.pack(*state) if packed else state
        jax.eval_shape(
            functools.partial(
                sparse_update,
                rule=pair.rule,
                learning_rate=RATE,
                implementation=implementation,
                **options,
            ),
            stored,
            ids,
            grads,
        )
    except ValueError as error:
        return str(error)
    return None


MODES = {
    "lazy": {},
    "wrapped": WRAPPED,
    "all_rows": {"lazy": False},
    "each": {"use_gradient_accumulation": False},
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("implementation", QUICK)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_where_all_are_supported(pair, implementation, packed):
    if packed and pair.facts.per_row:
        assert "must be (V, D)" in str(unsupported(pair, implementation, True, {}))
        return
    for options in MODES.values():
        check(pair, implementation, packed, options, dim=20)


KERNELS = [
    (pair, implementation, packed)
    for pair in PAIRS
    for implementation in ("tensorcore", "sweep", "sparsecore")
    for packed in (False, True)
    if pair.name in (FEW_PACKED if packed else FEW)
    and unsupported(pair, implementation, packed, {}) is None
]


@pytest.mark.parametrize(
    ("pair", "implementation", "packed"),
    KERNELS,
    ids=[f"{p}-{i}-{'packed' if k else 'plain'}" for p, i, k in KERNELS],
)
def test_kernels(pair, implementation, packed):
    options = WRAPPED if packed else {}
    check(pair, implementation, packed, options, dim=32 if packed else 128)


def test_kernels_run_every_rule_that_has_no_numbers_of_rows():
    for pair in PAIRS:
        for implementation in dispatch.NAMES:
            reason = unsupported(pair, implementation, False, {})
            if implementation in ("cpu", "xla", "tensorcore"):
                assert reason is None
            elif pair.facts.per_row:
                assert "numbers of whole rows" in str(reason)
            elif implementation == "sparsecore" and pair.facts.beyond_subcores:
                assert pair.facts.beyond_subcores[0] in str(reason)
            else:
                assert reason is None


def test_a_state_of_another_rule_is_refused():
    sgd, adagrad = (next(p for p in PAIRS if p.name == n) for n in ("sgd", "adagrad"))
    state = tuple(map(jnp.asarray, adagrad.state(V, 8)))
    ids, grads = batch(8)
    either: Any = (state, PackedTable.pack(*state))
    for stored in either:
        with pytest.raises(ValueError, match=r"2 arrays, but SGDRule has 1"):
            sparse_update(stored, ids, grads, sgd.rule, learning_rate=RATE)
    with pytest.raises(TypeError, match="must be an update rule, such as AdamRule"):
        sparse_update(state, ids, grads, cast(Any, "adam"), learning_rate=RATE)


def test_traced_decay_and_scale_do_not_recompile():
    pair = next(p for p in PAIRS if p.name == "sgd")
    state = tuple(map(jnp.asarray, pair.state(V, 8)))
    ids, grads = batch(8)

    @jax.jit
    def update(state, decay, scale):
        return sparse_update(
            state,
            ids,
            grads,
            pair.rule,
            learning_rate=RATE,
            weight_decay_factor=decay,
            gradient_scale=scale,
        )

    for decay, scale in ((0.0, 1.0), (0.5, 0.25)):
        (new,) = update(state, decay, scale)
        (right,) = reference.sparse_update(
            pair.state(V, 8),
            ids,
            grads,
            pair.step,
            learning_rate=RATE,
            weight_decay_factor=decay,
            gradient_scale=scale,
        )
        np.testing.assert_allclose(new, right, rtol=1e-6, atol=1e-6)
    assert cast(Any, update)._cache_size() == 1
