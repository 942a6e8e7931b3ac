"""The CPU kernel under JAX: in place, unsorted ids, many callers, errors, absence."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_adam import (
    AdamState,
    PackedTable,
    explain,
    packed_adam_update,
    plan_update,
    reference,
    sparse_adam_update,
    sparse_update,
)
from sparse_adam.kernels import cpu
from sparse_adam.kernels.spec import SortedBatch, StepScalars
from sparse_adam.ops import dispatch
from sparse_adam.ops.xla import xla_update
from sparse_adam.rules import SGDRule
from tests import cases, helpers, programs
from tests.cases import CASES, Case
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal
from tests.kernels import stored

DEFAULT = CASES[0]
MODES = {
    "lazy": {},
    "each_occurrence": {"use_gradient_accumulation": False},
    "not_lazy": {"lazy_adam": False},
}
update = functools.partial(sparse_adam_update, implementation="cpu")


@functools.cache
def compiled(num_rows, mode, dtype="float32", planned=False, packed=False):
    table: Any = jax.ShapeDtypeStruct((num_rows, 128), dtype)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    grads = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    state = AdamState(table, table, table)

    def run(state: AdamState | PackedTable, ids, grads):
        plan = plan_update(ids, num_rows) if planned else None
        options: dict[str, Any] = MODES[mode] | {"plan": plan}
        if isinstance(state, PackedTable):
            return packed_adam_update(state, ids, grads, **options)
        return sparse_adam_update(*state, ids, grads, **options)

    if packed:
        state = jax.eval_shape(PackedTable.pack, *state)
    run = jax.jit(run, donate_argnums=0)
    return programs.as_for_users(run.lower(state, ids, grads))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_default_and_updates_in_place(mode, dtype, packed):
    program = compiled(500_000, mode, dtype, packed=packed)
    assert "sparse_adam_cpu" in programs.text(program)
    memory = programs.memory(program)
    # Three bfloat16 arrays take two planes of words.
    numbers = 2 if packed and dtype == "bfloat16" else 3
    width = 4 if packed else jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == numbers * 500_000 * 128 * width
    assert memory.temp_size_in_bytes < 4096
    assert "copy(" not in programs.text(program)


def test_only_a_plan_is_sorted_by_xla():
    assert "sort(" not in programs.text(compiled(1000, "lazy"))
    assert "sort(" in programs.text(compiled(1000, "lazy", planned=True))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_wild_ids_and_sources_move_nothing(mode, packed):
    # Past the op, which makes all such ids V and all such sources -1.
    case = Case("", 40, 16, 12, options=MODES[mode])
    state, _, grads, _ = cases.arrays(case)
    ids = np.array([-1, 40, 2**31 - 1, -(2**31), 7, 41, 3, 7, -7, 39, 0, 100], np.int32)
    sources = np.array([0, 1, 2, 3, 4, 5, -5, 12, 8, 2**31 - 1, 10, -(2**31)], np.int32)
    problem = helpers.spec(case, cases.Arrays(state, ids, grads, {}), packed)
    grads = grads[:9]  # fewer than there are ids
    new = updated(state, (grads, ids, sources, None), problem, rate=1e-3)
    options = MODES[mode] | {"sample_ids": sources}
    expected = reference.sparse_adam_update(*state, ids, grads, **options)
    helpers.assert_close_states(new, state, expected, steps=2)
    if mode != "not_lazy":
        touched = np.isin(np.arange(40), ids)
        for x, old in zip(new, state, strict=True):
            assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


def updated(state, batch, problem, rate, seeds=None):
    """The kernel's result, in lines whose other words are full of noise if packed."""
    given = (
        (stored.pack(state).view(np.int32),)
        if problem.layout.storage == "packed"
        else state
    )
    run = jax.jit(functools.partial(cpu.cpu_update, spec=problem))
    batch = SortedBatch(*jax.tree.map(jnp.asarray, tuple(batch)))
    step = StepScalars(
        jnp.float32([rate, 0.25 if problem.decays else 0, 0]),
        None if seeds is None else jnp.int32(seeds),
    )
    new = tuple(map(np.asarray, run(tuple(map(jnp.asarray, given)), batch, step)))
    if problem.layout.storage == "plain":
        return new
    (lines,) = new
    new = stored.unpack(lines.view(np.uint32), state)
    assert_bitwise_equal(lines.view(np.uint32), stored.pack(new))
    return new


def exact(case):
    """A case whose float32 numbers are exact, so that only the rounding can differ."""
    options = {
        "beta_1": 0.5,
        "beta_2": 0.5,
        "weight_decay_factor": 0.25,
        "sum_inside_sqrt": False,
    }
    return dataclasses.replace(case, options={**options, **case.options})


SEEDS = (123, -(2**31), 2**31 - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "float32"),
    ],
    ids=str,
)
def test_stochastic_rounding_is_that_of_the_portable_path(dtypes, mode):
    case = Case("", 40, 20, 30, "padded", (*dtypes, "float32"))
    case = exact(dataclasses.replace(case, options=MODES[mode]))
    state, ids, grads, _ = arrays = cases.arrays(case)
    ids = np.sort(np.where(ids < 0, case.num_rows, ids))
    problem = helpers.spec(case, arrays._replace(ids=ids))
    problem = helpers.changed(problem, stochastic=True)
    batch = jnp.asarray(grads), jnp.asarray(ids), jnp.arange(30), None
    batch = SortedBatch(*batch)
    step = StepScalars(jnp.float32([0, 0.25, 0]), jnp.int32(SEEDS))
    portable = jax.jit(functools.partial(xla_update, spec=problem))
    expected = portable(tuple(map(jnp.asarray, state)), batch, step)
    for packed in (False, True):
        problem = helpers.changed(problem, packed=packed, stochastic=True)
        new = updated(state, batch, problem, rate=0, seeds=SEEDS)
        assert_states_bitwise_equal(new, expected)
        problem = helpers.changed(problem, stochastic=False)
        nearest = updated(state, batch, problem, rate=0)
        assert any((x != y).any() for x, y in zip(new, nearest, strict=True))


def test_two_sorted_halves_are_sorted_as_one():
    # Two threads look at a half each, and only where these meet do the ids descend.
    half = np.arange(10_000, dtype=np.int32)
    zeros, ones = np.zeros((10_000, 4), np.float32), np.ones((20_000, 4), np.float32)
    ids = np.concatenate([half, half])
    new = update(zeros, zeros, zeros, ids, ones, beta_1=0.0)
    assert (np.asarray(new.momenta) == 2).all()


@pytest.mark.parametrize("num_rows", [2, 33, 64, 65, 2049, 2**22 + 1])
def test_equal_ids_make_one_step_wherever_they_are(num_rows):
    """Rows one apart, and rows that differ in the highest bit alone."""
    half = 2 ** (int(num_rows - 1).bit_length() - 1)
    for pair in ([1, 0], [num_rows - 1, num_rows - 1 - half]):
        ids, grads = np.array(pair * 3, np.int32), np.ones((6, 1), np.float32)
        zeros = np.zeros((num_rows, 1), np.float32)
        new = update(zeros, zeros, zeros, ids, grads, beta_1=0.0)
        np.testing.assert_array_equal(np.asarray(new.momenta)[pair], 3)


def test_a_row_at_the_start_of_a_block_is_stepped_once():
    """Of all rows, 4,096 of D = 16 are one block."""
    halves, zeros = np.full((5000, 16), 0.5, np.float32), np.zeros((3, 16), np.float32)
    ids = np.array([4096, 0, 4999], np.int32)
    new = update(halves, halves, halves, ids, zeros, lazy_adam=False, beta_1=0.5)
    assert (np.asarray(new.momenta) == 0.25).all()


def test_ties_go_to_the_even_neighbour_and_a_nan_of_any_bits_stays_one():
    unit = 2.0**-7
    table = np.array([[1, 1 + unit, 1, 1]], jnp.bfloat16)
    # 1.5 units would be the larger of two neighbours, too; the last NaN is all ones.
    moved = np.array([[0.5, 0.5, 1.5, 0]], np.float32) * unit
    moved[0, 3:].view(np.uint32)[:] = 0x7FFFFFFF
    options: Any = {"learning_rate": 1, "implementation": "cpu"}
    state: Any = (table,)
    (new,) = sparse_update(state, np.array([0]), -moved, SGDRule(), **options)
    new = np.asarray(new).astype(np.float32)[0]
    np.testing.assert_array_equal(new, [1, 1 + 2 * unit, 1 + 2 * unit, np.nan])


def many_updates(seed):
    """Some updates in turn, each large enough for several threads."""
    case = Case("", 2000, 32, 20_000, "zipf")
    state, ids, grads, _ = cases.arrays(case, seed)
    for _ in range(5):
        state = update(*state, ids, grads)
    return jax.tree.map(np.asarray, state)


def test_callers_from_many_threads():
    expected = [many_updates(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as executor:
        seeds = [seed % 4 for seed in range(16)]
        for seed, new in zip(seeds, executor.map(many_updates, seeds), strict=True):
            assert_states_bitwise_equal(new, expected[seed])


def test_many_updates_on_two_devices_at_once():
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    each = PartitionSpec("t")
    case = Case("", 2000, 32, 20_000, "zipf")
    tables = [cases.arrays(case, seed) for seed in range(2)]
    state, ids, grads, _ = jax.tree.map(lambda *x: np.concatenate(x), *tables)
    state = AdamState(*state)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(each, each, each), out_specs=each
    )
    def step(state: AdamState, ids, grads):
        return update(*state, ids, grads)

    for _ in range(5):
        state = step(state, ids, grads)
    for i in range(2):
        own = [np.asarray(x)[2000 * i : 2000 * (i + 1)] for x in state]
        assert_states_bitwise_equal(own, many_updates(i))


def test_without_its_library(monkeypatch, tmp_path):
    missing = f"its C++ library was not built: there is no {tmp_path}"
    monkeypatch.setattr(cpu.library, "load", lambda: missing)
    state, ids, grads, _ = cases.arrays(DEFAULT)
    words = explain(*state, ids, grads)
    assert words.startswith("here, on cpu: xla, compiled\n")
    assert missing in words
    with pytest.raises(ValueError, match="was not built"):
        update(*state, ids, grads)
    problem = helpers.spec(DEFAULT, cases.arrays(DEFAULT))
    assert dispatch.choices(problem, None).on_cpu.implementation.name == "xla"
    cpu.warn_of_fallback.cache_clear()
    jax.clear_caches()
    with pytest.warns(RuntimeWarning, match="by its portable path.*was not built"):
        new = sparse_adam_update(*state, ids, grads)
    expected = sparse_adam_update(*state, ids, grads, implementation="xla")
    assert_states_bitwise_equal(new, expected)


def test_bytes_moved():
    # By hand: 2 gradient rows, one row of three tables in and out, 2 ids.
    assert cpu.bytes_moved(num_ids=2, num_unique=1, dim=16) == 2 * 64 + 6 * 64 + 8
