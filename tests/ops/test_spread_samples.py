"""Tables and batches that are spread over eight devices, held to those of one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sparse_adam import PackedTable
from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from sparse_adam.ops.combine import Samples, combine
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.sparse_update import update_state
from sparse_adam.ops.spread import Spread
from sparse_adam.ops.spread_samples import lookup_batch, route_batch, update_batch
from sparse_adam.rules import AdagradRule
from tests.helpers import assert_bitwise_equal

V, D = 4091, 8
SIZES = (16, 5, 24)  # S of three features, of which 5 does not divide by 8
PLACES = 6
NUM_NAMED = 70
DTYPES = (np.dtype(np.float32),) * 2
RULE = AdagradRule(initial_accumulator_value=0.5)
OPTIONS = UpdateOptions(learning_rate=0.25)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
DISTRIBUTIONS = ("uniform", "zipf", "one owner", "padded", "empty devices", "one row")


@functools.cache
def mesh(*types: AxisType) -> Mesh:
    return jax.make_mesh((2, 2, 2), ("y", "x", "z"), axis_types=types or (AUTO,) * 3)


def spread_over(*axes: str, types: Any = (), interleaved: bool = True) -> Spread:
    return Spread(mesh(*types), axes or ("y", "x", "z"), interleaved)


def table() -> tuple[np.ndarray, np.ndarray]:
    """Weights and a slot of whole numbers of eighths: their sums are exact."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-32, 32, (V, D)) / 8
    return weights.astype(np.float32), rng.uniform(size=(V, D)).astype(np.float32)


def draw(kind: str, seed: int = 0) -> tuple[list[Samples], list[np.ndarray]]:
    """The batch of a padded, an uneven padded and a ragged feature, and gradients."""
    rng = np.random.default_rng(seed)

    def ids(shape: tuple[int, ...]) -> np.ndarray:
        uniform = rng.integers(0, V, shape)
        if kind == "zipf":
            return np.minimum(rng.zipf(1.2, shape) - 1, V - 1)
        if kind == "one owner":
            return uniform // 8 * 8
        if kind == "padded":
            return np.where(rng.random(shape) < 0.9, -1, uniform)
        if kind == "empty devices":
            keep = rng.random((shape[0], *(1,) * (len(shape) - 1))) < 0.3
            return np.where(keep, uniform, -1)
        return np.full(shape, 7) if kind == "one row" else uniform

    def numbers(*shape: int) -> np.ndarray:
        return rng.choice([0.5, 1, 4, 2], shape).astype(np.float32)

    padded, uneven, ragged = SIZES
    owners = np.sort(rng.integers(0, ragged + 1, NUM_NAMED)).astype(np.int32)
    batch = [
        Samples(ids((padded, PLACES)).reshape(-1), None, None, numbers(padded)),
        Samples(ids((uneven, 2)).reshape(-1), None, numbers(2 * uneven), None),
        Samples(ids((NUM_NAMED,)), owners, numbers(NUM_NAMED), numbers(ragged)),
    ]
    batch = [x._replace(ids=x.ids.astype(np.int32)) for x in batch]
    return jax.tree.map(jnp.asarray, batch), [
        rng.integers(-8, 8, (size, D)).astype(np.float32) / 4 for size in SIZES
    ]


@jax.jit
def one_device(state: Any, batch: Any, grads: Any) -> Any:
    """A lookup, and an update by gradients that depend on it."""
    layout, found = PlainLayout.of_weights(state[0]), []
    ids, sources, gains, start = [], [], [], 0
    for part, size in zip(batch, SIZES, strict=True):
        found.append(combine(state[0], part, size, layout=layout))
        owners = part.owners
        if owners is None:
            owners = jnp.repeat(jnp.arange(size), part.ids.size // size)
        ids.append(part.ids)
        sources.append(jnp.where(owners < size, owners + start, -1))
        factors = part.factors()
        gains.append(jnp.ones(part.ids.shape) if factors is None else factors)
        start += size
    flat = jnp.concatenate(moved(grads, found))
    joined = [jnp.concatenate(x) for x in (ids, sources, gains)]
    inputs = UpdateInputs(joined[0], flat, joined[1], joined[2])
    return update_state(state, inputs, RULE, OPTIONS), found


def moved(grads: Any, found: Any) -> list[jax.Array]:
    return [g + x / 4 for g, x in zip(grads, found, strict=True)]


@functools.partial(jax.jit, static_argnames=("spread", "layout", "early"))
def many(
    state: Any, batch: Any, grads: Any, spread: Any, layout: Any, early: Any
) -> Any:
    how: Any = {"spread": spread, "layout": layout, "sizes": SIZES}
    if early:
        how["route"] = route_batch(batch, spread=spread, num_rows=V, sizes=SIZES)
    found = lookup_batch(state[0], batch, **how)
    grads = moved(grads, found)
    return update_batch(state, batch, grads, RULE, OPTIONS, **how), found


def check(spread: Spread, kinds: Any, storage: str = "plain", early: bool = True):
    """Makes a step of each kind of batch, whose sums are exact, and then two more."""
    layout: Any = PlainLayout(V, D, DTYPES, (False, False))
    if storage == "packed":
        layout = PackedLayout(V, D, DTYPES)
    start, rows = table(), spread.part(layout).num_rows

    def placed() -> tuple[jax.Array, ...]:
        arrays = [spread.place(jnp.asarray(x), rows) for x in start]
        packed = storage == "packed"
        return (PackedTable.pack(*arrays).lines,) if packed else tuple(arrays)

    def compare(same: Any, expected: Any, found: Any, state: Any, new: Any) -> None:
        if storage == "packed":
            new = PackedTable(new[0], spread.whole(layout)).unpack()
        assert all(x.sharding.is_equivalent_to(spread.sharding, 2) for x in new)
        new = [spread.logical(x, V) for x in new]
        for one, two in zip([*found, *new], [*expected, *state], strict=True):
            same(one, two)

    for kind in kinds:
        batch, grads = draw(kind)
        state, expected = one_device(start, batch, grads)
        new, found = many(placed(), batch, grads, spread, layout, early)
        compare(assert_bitwise_equal, expected, found, state, new)
        for seed in (1, 2):
            batch, grads = draw(kind, seed)
            state, expected = one_device(state, batch, grads)
            new, found = many(new, batch, grads, spread, layout, early)
        compare(close, expected, found, state, new)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_steps_are_those_of_one_device(storage):
    check(spread_over(), DISTRIBUTIONS, storage)


@pytest.mark.parametrize(
    ("types", "axes", "interleaved"),
    [
        ((EXPLICIT,) * 3, ("x", "y"), True),
        ((AUTO, EXPLICIT, AUTO), ("y", "x"), False),
    ],
    ids=["explicit, two axes", "mixed, in ranges"],
)
def test_any_mesh_with_replicas_along_other_axes(types, axes, interleaved):
    spread = spread_over(*axes, types=types, interleaved=interleaved)
    check(spread, ["zipf"], early=False)
