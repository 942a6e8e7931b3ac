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
SIZES = (16, 5, 24, 11)  # S of each feature; some do not divide by 8
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


def draw(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """The batch of two padded, a ragged and a sparse feature, and gradients."""
    rng = np.random.default_rng(seed)

    def ids(shape: tuple[int, ...]) -> Any:
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

    def numbers(*shape: int) -> Any:
        return rng.choice([0.5, 1, 4, 2], shape).astype(np.float32)

    padded, uneven, ragged, sparse = SIZES
    owners: Any = np.sort(rng.integers(0, ragged + 1, NUM_NAMED)).astype(np.int32)
    unsorted: Any = rng.integers(0, sparse + 1, 30, np.int32)
    batch: Any = [
        Samples(ids((padded, PLACES)).reshape(-1), None, None, numbers(padded)),
        Samples(ids((uneven, 2)).reshape(-1), None, numbers(2 * uneven), None),
        Samples(ids((NUM_NAMED,)), owners, numbers(NUM_NAMED), numbers(ragged)),
        Samples(ids((30,)), unsorted, None, None),
    ]
    batch = [x._replace(ids=x.ids.astype(np.int32)) for x in batch]
    return jax.tree.map(jnp.asarray, batch), [
        rng.integers(-8, 8, (size, D)).astype(np.float32) / 4 for size in SIZES
    ]


def joined(batch: Any, grads: Any) -> UpdateInputs:
    """The batch of all features as one, with its samples one behind the other."""
    ids, sources, gains, start = [], [], [], 0
    for part, size in zip(batch, SIZES, strict=True):
        owners = part.owners
        if owners is None:
            owners = jnp.repeat(jnp.arange(size), part.ids.size // size)
        ids.append(part.ids)
        sources.append(jnp.where(owners < size, owners + start, -1))
        factors = jnp.ones(part.ids.shape) if part.gains is None else part.gains
        if part.scales is not None:
            factors = factors * part.scales[jnp.minimum(owners, size - 1)]
        gains.append(factors)
        start += size
    flat, *rest = map(jnp.concatenate, (grads, ids, sources, gains))
    return UpdateInputs(rest[0], flat, rest[1], rest[2])


@jax.jit
def one_device(state: Any, batch: Any, grads: Any) -> Any:
    """A lookup, and an update by gradients that depend on it."""
    layout = PlainLayout.of_weights(state[0])
    found = [
        combine(state[0], part, size, layout=layout)
        for part, size in zip(batch, SIZES, strict=True)
    ]
    return update_state(state, joined(batch, moved(grads, found)), RULE, OPTIONS), found


def stored(arrays: Any, spread: Spread, storage: str) -> tuple[Any, Any]:
    """The arrays on the devices, and the layout of them all on one."""
    layout: Any = PlainLayout(V, D, DTYPES, (False, False))
    rows = spread.part(layout).num_rows
    placed = tuple(spread.place(jnp.asarray(x), rows) for x in arrays)
    if storage == "plain":
        return placed, layout
    return (PackedTable.pack(*placed).lines,), PackedLayout(V, D, DTYPES)


def logical(state: Any, spread: Spread, layout: Any) -> list[jax.Array]:
    if isinstance(layout, PackedLayout):
        whole: Any = spread.whole(layout)
        state = PackedTable(state[0], whole).unpack()
    assert all(x.sharding.is_equivalent_to(spread.sharding, 2) for x in state)
    return [spread.logical(x, V) for x in state]


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
    """Makes a step of each kind of batch, whose sums are exact; of "zipf" two more."""
    start = table()

    def compare(same: Any, expected: Any, found: Any, state: Any, new: Any) -> None:
        new = logical(new, spread, layout)
        for one, two in zip([*found, *new], [*expected, *state], strict=True):
            same(one, two)

    for kind in kinds:
        batch, grads = draw(kind)
        state, expected = one_device(start, batch, grads)
        new, layout = stored(start, spread, storage)
        new, found = many(new, batch, grads, spread, layout, early)
        compare(assert_bitwise_equal, expected, found, state, new)
        if kind != "zipf":
            continue
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


@pytest.mark.parametrize(
    ("storage", "options"),
    [
        ("packed", UpdateOptions(0.25, lazy=False, clip_weight_max=1.0)),
        (
            "plain",
            UpdateOptions(0.25, use_gradient_accumulation=False, gradient_scale=0.5),
        ),
    ],
    ids=["not lazy", "a step for each occurrence"],
)
def test_updates_that_are_no_sum_for_each_row(storage, options):
    batch, grads = draw("zipf")
    arrays, spread = table(), spread_over()
    state, layout = stored(arrays, spread, storage)
    new = update_batch(
        state, batch, grads, RULE, options, spread=spread, layout=layout, sizes=SIZES
    )
    expected = update_state(arrays, joined(batch, grads), RULE, options)
    for one, two in zip(logical(new, spread, layout), expected, strict=True):
        assert_bitwise_equal(one, two)


def test_devices_do_not_share_their_noise():
    """Row r of each device is stepped alike, and is rounded in another way."""
    num_rows, spread = 64, spread_over()
    layout = PlainLayout(num_rows, D, (np.dtype(jnp.bfloat16),) * 2, (False, False))
    rows = spread.part(layout).num_rows
    ones = spread.place(jnp.ones((num_rows, D), jnp.bfloat16), rows)
    batch = Samples(jnp.arange(num_rows), None, None, None)
    options = UpdateOptions(rounding="stochastic", key=jax.random.key(0))
    how: Any = {"spread": spread, "layout": layout, "sizes": (num_rows,)}
    grads = [jnp.ones((num_rows, D))]
    new = update_batch((ones, ones), [batch], grads, RULE, options, **how)
    parts = np.split(np.asarray(new[0]), spread.count)
    assert len({part.tobytes() for part in parts}) == spread.count


def test_a_batch_without_samples_and_one_without_ids():
    spread, arrays = spread_over(), table()
    state, layout = stored(arrays, spread, "plain")
    nothing = jnp.zeros(0, jnp.int32)
    batch = [Samples(nothing, None, None, None), Samples(nothing, nothing, None, None)]
    how: Any = {"spread": spread, "layout": layout, "sizes": (0, 3)}
    found = lookup_batch(state[0], batch, **how)
    assert [x.shape for x in found] == [(0, D), (3, D)] and not found[1].any()
    new = update_batch(state, batch, [None, None], RULE, OPTIONS, **how)
    for one, two in zip(logical(new, spread, layout), arrays, strict=True):
        assert_bitwise_equal(one, two)


def test_axes_that_are_none_are_refused():
    for axes in ((), ("w",), ("x", "x")):
        with pytest.raises(ValueError, match="must be one or more of the mesh's axes"):
            Spread(mesh(), axes)
    with pytest.raises(TypeError, match="must be a tuple"):
        Spread(mesh(), "x")  # type: ignore[arg-type]
