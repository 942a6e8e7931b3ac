"""The CPU kernel under JAX: in place, unsorted ids, many callers, errors, absence."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_adam import AdamState, explain, plan_update, reference, sparse_adam_update
from sparse_adam.kernels import cpu
from sparse_adam.ops import dispatch
from tests import cases, helpers
from tests.cases import CASES, Case
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal

DEFAULT = CASES[0]
MODES = {
    "lazy": {},
    "each_occurrence": {"use_gradient_accumulation": False},
    "not_lazy": {"lazy_adam": False},
}
update = functools.partial(sparse_adam_update, implementation="cpu")


@functools.cache
def compiled(num_rows, mode, dtype="float32", planned=False):
    table = jax.ShapeDtypeStruct((num_rows, 128), dtype)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    grads = jax.ShapeDtypeStruct((64, 128), jnp.float32)

    def run(table, momenta, velocities, ids, grads):
        plan = plan_update(ids, num_rows) if planned else None
        options = MODES[mode] | {"plan": plan}
        return sparse_adam_update(table, momenta, velocities, ids, grads, **options)

    run = jax.jit(run, donate_argnums=(0, 1, 2))
    return run.lower(table, table, table, ids, grads).compile()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_default_and_updates_in_place(mode, dtype):
    program = compiled(500_000, mode, dtype)
    assert "sparse_adam_cpu" in program.as_text()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == 3 * 500_000 * 128 * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes < 4096
    assert "copy(" not in program.as_text()


def test_only_a_plan_is_sorted_by_xla():
    assert "sort(" not in compiled(1000, "lazy").as_text()
    assert "sort(" in compiled(1000, "lazy", planned=True).as_text()


@pytest.mark.parametrize("mode", MODES)
def test_wild_ids_and_sources_move_nothing(mode):
    # Past the op, which makes all such ids V and all such sources -1.
    state, _, grads, _ = cases.arrays(Case("", 40, 16, 12))
    ids = np.int32([-1, 40, 2**31 - 1, -(2**31), 7, 41, 3, 7, -7, 39, 0, 100])
    sources = np.int32([0, 1, 2, 3, 4, 5, -5, 12, 8, 2**31 - 1, 10, -(2**31)])
    problem = helpers.problem(
        Case("", 40, 16, 12, options=MODES[mode]), cases.Arrays(state, ids, grads, {})
    )
    arguments = (*map(jnp.asarray, (*state, grads, ids, sources)), None)
    new = jax.jit(functools.partial(cpu.cpu_update, problem=problem))(
        *arguments, jnp.float32(1e-3)
    )
    options = MODES[mode] | {"sample_ids": sources}
    expected = reference.sparse_adam_update(*state, ids, grads, **options)
    helpers.assert_close_states(new, state, expected, steps=2)
    if mode != "not_lazy":
        touched = np.isin(np.arange(40), ids)
        for x, old in zip(new, state, strict=True):
            assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


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
    state = AdamState(*(np.concatenate([t.state[i] for t in tables]) for i in range(3)))
    ids, grads = (np.concatenate([t[i] for t in tables]) for i in (1, 2))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(each, each, each), out_specs=each
    )
    def step(state, ids, grads):
        return update(*state, ids, grads)

    for _ in range(5):
        state = step(state, ids, grads)
    for i in range(2):
        own = [np.asarray(x)[2000 * i : 2000 * (i + 1)] for x in state]
        assert_states_bitwise_equal(own, many_updates(i))


def call(table, momenta, velocities, grads, ids, sources, gains, in_place=True):
    """The custom call itself, with arguments that the op would never make."""
    arrays = (table, momenta, velocities, grads, ids, sources, gains)
    problem = helpers.problem(DEFAULT, cases.arrays(DEFAULT))
    aliases = {0: 0, 1: 1, 2: 2} if in_place else None
    run = jax.ffi.ffi_call(
        "sparse_adam_cpu", (table, momenta, velocities), input_output_aliases=aliases
    )
    run = functools.partial(run, **cpu.attributes(problem))
    return jax.block_until_ready(jax.jit(run)(*arrays, jnp.float32(0.1)))


GOOD = {
    "table": jnp.ones((40, 8)),
    "momenta": jnp.ones((40, 8)),
    "velocities": jnp.ones((40, 8)),
    "grads": jnp.ones((6, 8)),
    "ids": jnp.zeros((6,), jnp.int32),
    "sources": jnp.zeros((6,), jnp.int32),
    "gains": jnp.zeros((0,), jnp.float32),
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"table": jnp.ones((40,))}, "the table must be"),
        ({"momenta": jnp.ones((40, 4))}, "one shape"),
        ({"velocities": jnp.ones((39, 8))}, "one shape"),
        ({"velocities": jnp.ones((40, 8), jnp.float16)}, "float32 or bfloat16"),
        ({"grads": jnp.ones((6, 9))}, "the gradients must be"),
        ({"grads": jnp.ones((6, 8), jnp.float16)}, "the gradients must be float32"),
        ({"sources": jnp.zeros((5,), jnp.int32)}, "sources must be"),
        ({"gains": jnp.ones((5,))}, "gains must be"),
        ({"ids": jnp.zeros((6,), jnp.int16)}, "Wrong buffer dtype"),
        ({"in_place": False}, "in place"),
    ],
)
def test_errors_are_python_exceptions(bad, message):
    assert cpu.unsupported(helpers.problem(DEFAULT, cases.arrays(DEFAULT))) is None
    call(**GOOD)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(**GOOD | bad)


def test_without_its_library(monkeypatch, tmp_path):
    load = cpu._load.__wrapped__
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    missing = load()
    assert "was not built" in missing
    (tmp_path / "none.so").write_text("no library")
    assert "does not load" in load()

    monkeypatch.setattr(cpu, "_load", lambda: missing)
    state, ids, grads, _ = cases.arrays(DEFAULT)
    words = explain(*state, ids, grads)
    assert "\ncpu: xla, compiled\n" in words
    assert missing in words
    with pytest.raises(ValueError, match="was not built"):
        update(*state, ids, grads)
    problem = helpers.problem(DEFAULT, cases.arrays(DEFAULT))
    assert dispatch.choices(problem, None).on_cpu.name == "xla"
    new = sparse_adam_update(*state, ids, grads)
    expected = sparse_adam_update(*state, ids, grads, implementation="xla")
    assert_states_bitwise_equal(new, expected)


def test_bytes_moved():
    # By hand: 2 gradient rows, one row of three tables in and out, 2 ids.
    assert cpu.bytes_moved(num_ids=2, num_unique=1, dim=16) == 2 * 64 + 6 * 64 + 8
