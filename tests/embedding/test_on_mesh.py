"""Tables spread over the eight devices of a mesh, held to those of one device."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_adam.embedding import (
    Adagrad,
    EmbeddingState,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    apply_gradients,
    explain,
    init,
    lookup,
    to_logical,
)
from tests import programs
from tests.embedding import hlo

V, D, B, PLACES = 4091, 4, 24, 5


@functools.cache
def mesh(*types: AxisType) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=types or (AxisType.Auto,) * 2)


@functools.cache
def config() -> dict[str, FeatureConfig]:
    """Features of every form; two tables share a stack, one is alone in its width."""
    # Without LLVM's passes the default initializer is not the same in every program.
    draw = jax.nn.initializers.normal(0.5)
    item = TableConfig(V, D, draw, combiner="mean", name="item")
    user = TableConfig(77, D, draw, combiner="sqrtn", name="user")
    wide = TableConfig(9, 2 * D, draw, combiner="sum", name="wide")
    return {
        "dense": FeatureConfig(item),
        "padded": FeatureConfig(item),
        "ragged": FeatureConfig(user),
        "sequence": FeatureConfig(user, max_sequence_length=3),
        "sparse": FeatureConfig(wide),
    }


def features(kind: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def ids(num_rows: int, *shape: int) -> np.ndarray:
        drawn = rng.integers(0, num_rows, shape)
        if kind == "zipf":
            drawn = np.minimum(rng.zipf(1.2, shape) - 1, num_rows - 1)
        elif kind == "one owner":
            drawn = drawn // 8 * 8
        elif kind == "padded":
            drawn = np.where(rng.random(shape) < 0.9, -1, drawn)
        elif kind == "empty devices":
            drawn[: shape[0] // 2] = -1
        return drawn.astype(np.int32)

    splits = np.sort(np.append(rng.integers(0, 41, B - 1), (0, 40))).astype(np.int32)
    cells = rng.permutation(B * PLACES)[:30]
    indices = np.stack((cells // PLACES, cells % PLACES), 1).astype(np.int32)
    return {
        "dense": ids(V, B),
        "padded": ids(V, B, PLACES),
        "ragged": Ragged(ids(77, 40), splits),
        "sequence": ids(77, B, 4),
        "sparse": Sparse(indices, ids(9, 30), (B, PLACES)),
    }


@functools.partial(jax.jit, donate_argnums=0)
def step(state: EmbeddingState, features: Any) -> Any:
    """Also returns the activations, on which the gradients depend."""
    activations = lookup(state, features)
    gradients = jax.tree.map(lambda x: jnp.sin(3 * x) + 0.1, activations)
    return apply_gradients(state, features, gradients), activations


def start(
    storage: Any, mesh: Any = None, axes: Any = None, names: Any = None
) -> EmbeddingState:
    """The tables of some features, or of all."""
    key, optimizer = jax.random.key(0), Adagrad(0.1, initial_accumulator_value=0.5)
    chosen = {name: config()[name] for name in names or config()}
    return init(chosen, optimizer, key, storage=storage, mesh=mesh, axes=axes)


def check(one: Any, other: Any) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_steps_are_those_of_one_device(storage):
    """One program makes them all, so its memory is that of any skew."""
    one, many = start(storage), start(storage, mesh(), ("y", "x"))
    same = jax.tree.map(np.array_equal, to_logical(one), to_logical(many))
    assert jax.tree.all(same)
    place = NamedSharding(mesh(), PartitionSpec(("y", "x")))
    kinds = ("uniform", "zipf", "one owner", "padded", "empty devices")
    for seed, kind in enumerate(kinds):
        batch = features(kind, seed)
        one, expected = step(one, batch)
        with programs.compilations() as seconds:
            many, found = step(many, batch)
        assert bool(seconds) == (seed == 0)
        check(found, expected)
        for x in jax.tree.leaves(many):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    check(to_logical(many), to_logical(one))
    check(many.table("user"), one.table("user"))


def test_explain_says_how_a_batch_travels():
    """A device has 3 + 15 + 9 ids of its samples, and 8 ids that name theirs."""
    state, batch = start("plain", mesh()), features("uniform", 0)
    item, *_, wide = explain(state, batch).split("item, user: ")[1].split("wide: ")
    assert item == (
        "35 ids on each of 8 devices, routed (docs/routing.md)\n"
        "  route: one all-to-all of 1,184 bytes and one of 32 bytes\n"
        "  lookup: up to 35 rows, 560 bytes\n"
        "  update: up to 71 summed gradients, 1,136 bytes, in a round\n"
        "  ids that name their samples: one all-to-all of 320 bytes and one of 32 "
        "bytes; up to 25 sums of samples in a lookup, 400 bytes, and 8 gradients of "
        "samples in an update, 128 bytes\n"
        "  one round, if no device is asked for more than 71 rows, by one for 35\n"
        "  ragged-all-to-all on TPUs, all-to-all of equal parts elsewhere\n"
    )
    assert "lookup: up to 8 rows, 256 bytes" in wide
    sent = str(jax.make_jaxpr(lookup)(state, batch))
    assert "i32[8,37] = all_to_all" in sent  # 1,184 bytes
    assert "f32[71,4]" in sent  # 1,136 bytes
    alone = explain(start("plain"), batch).splitlines()
    assert alone[0].startswith("item, user: not routed")


def test_lookup_and_update_in_one_jit_share_a_route():
    """XLA merges what both make of the ids: three sorts and all that they send.

    A newer XLA than that of jax 0.10.2 leaves one of the two exchanges twice.
    """
    config = {"item": FeatureConfig(TableConfig(V, D, name="item"))}
    state = init(config, Adagrad(0.1), jax.random.key(0), storage="plain", mesh=mesh())
    batch = {"item": features("uniform", 0)["padded"]}

    def counts(function: Any, *arguments: Any) -> Counter[str]:
        lowered = jax.jit(function).lower(state, batch, *arguments)
        text = programs.text(programs.as_for_users(lowered))
        return hlo.counts(text, "sort", "while", "all-to-all", "all-reduce")

    separate = counts(lookup) + counts(apply_gradients, {"item": jnp.ones((B, D))})
    route = Counter({"sort": 3, "while": 1, "all-to-all": 2, "all-reduce": 2})
    saved = separate - counts(step)
    if jax.__version__ != "0.10.2":
        assert saved["all-to-all"] >= 1
        del route["all-to-all"], saved["all-to-all"]
    assert saved == route


@pytest.mark.parametrize(
    ("storage", "types"),
    [
        ("plain", (AxisType.Explicit, AxisType.Explicit)),
        ("packed", (AxisType.Auto, AxisType.Explicit)),
    ],
)
def test_explicit_and_mixed_axes_with_copies_along_one(storage, types):
    names = ("dense", "ragged")
    one = start(storage, names=names)
    many = start(storage, mesh(*types), "x", names)
    batch = {name: features("zipf", 1)[name] for name in names}
    one, expected = step(one, batch)
    with jax.set_mesh(mesh(*types)):
        many, found = step(many, batch)
    check(found, expected)
    check(to_logical(many), to_logical(one))
    assert found["dense"].sharding.spec[0] == "x"


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_step_within_a_shard_map(storage):
    """Each device passes its own samples, and gets their activations."""
    names, rows = ("padded", "sequence"), PartitionSpec(("x", "y"))
    one = start(storage, names=names)
    many = start(storage, mesh(), names=names)
    batch = {name: features("zipf", 1)[name] for name in names}
    one, expected = step(one, batch)
    mapped = jax.shard_map(
        step, mesh=mesh(), in_specs=(rows, rows), out_specs=rows, check_vma=False
    )
    many, found = jax.jit(mapped)(many, batch)
    check(found, expected)
    check(to_logical(many), to_logical(one))


def test_tables_of_a_stack_begin_on_different_devices():
    """So that one device does not have the first, popular rows of all of them."""
    three = Mesh(np.array(jax.devices()[:3]), "x")
    tables = [TableConfig(n, 128, combiner="sum", name=f"t{n}") for n in (48, 24, 9)]
    config = [FeatureConfig(table) for table in tables]
    key, optimizer = jax.random.key(0), Adagrad(0.1)
    one = init(config, optimizer, key, storage="packed")
    many = init(config, optimizer, key, storage="packed", mesh=three)
    (stack,) = many.layout.stacks
    assert [offset % 3 for offset in stack.offsets] == [0, 2, 1]
    (alone,) = one.layout.stacks
    assert alone.offsets == (0, 48, 72)
    batch = [np.array([[0, 1, 8], [8, 0, -1], [7, 7, 0]], np.int32)] * 3
    one, expected = step(one, batch)
    many, found = step(many, batch)
    check(found, expected)
    check(to_logical(many), to_logical(one))
