"""Which implementation runs, and how it is told."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from sparse_adam import explain, sparse_adam_update
from sparse_adam.kernels import sweep, tensorcore
from sparse_adam.ops import dispatch
from tests import cases, helpers
from tests.cases import CASES, Case

PROBLEMS = {case.name: helpers.spec(case, cases.arrays(case)) for case in CASES}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
WIDE = Case("wide", 40, 128, 24)
NARROW = Case("narrow", 40, 3, 24)
LARGE = Case("large", 4000, 128, 24)


def shapes(case):
    state, ids, grads, _ = cases.arrays(case)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*state, ids, grads)
    )


def problem(case):
    return helpers.spec(case, cases.arrays(case))


@each_problem
def test_none_takes_the_first_that_is_compiled_there_and_able(problem):
    # So large a table that no batch is large beside it.
    problem = helpers.changed(problem, num_rows=1_000_000)
    chosen = dispatch.choices(problem, None)
    for platform, one in chosen._asdict().items():
        platform = platform.removeprefix("on_")
        able = [
            other
            for other in dispatch.IMPLEMENTATIONS
            if other.compiled_on(platform) and other.unsupported(problem) is None
        ]
        assert one.implementation is able[0]


@pytest.mark.parametrize("name", dispatch.NAMES)
@each_problem
def test_a_named_one_is_taken_or_refused(problem, name):
    one = dispatch.IMPLEMENTATIONS[dispatch.NAMES.index(name)]
    reason = one.unsupported(problem)
    if reason is None:
        assert {c.implementation for c in dispatch.choices(problem, name)} == {one}
        return
    with pytest.raises(ValueError, match="cannot run this update") as error:
        dispatch.choices(problem, name)
    text = str(error.value)
    assert name in text
    assert reason in text
    able = [i for i in dispatch.IMPLEMENTATIONS if i.unsupported(problem) is None]
    assert all(repr(other.name) in text for other in able)


def test_the_last_one_does_everything():
    last = dispatch.IMPLEMENTATIONS[-1]
    assert last.native_to is None
    for problem in PROBLEMS.values():
        assert last.unsupported(problem) is None


def best_on_tpu(case, **changes):
    changed = helpers.changed(problem(case), **changes)
    return dispatch.choices(changed, None).on_tpu.implementation.name


def test_the_best_on_a_tpu():
    assert best_on_tpu(WIDE, num_rows=1000) == "tensorcore"
    assert best_on_tpu(NARROW) == "xla"
    assert best_on_tpu(WIDE, num_rows=1000, lazy=False) == "sweep"
    assert best_on_tpu(NARROW, num_rows=100_000, packed=True) == "tensorcore"


@pytest.mark.parametrize("dim, packed", [(128, False), (64, True)])
def test_the_sweep_where_a_batch_is_large_beside_the_table(dim, packed):
    case = problem(Case("", 40, dim, 24))
    many = helpers.changed(case, num_rows=10_000, packed=packed)
    share = sweep.crossover(many, "tensorcore")
    assert 0.1 < share < 0.6
    below, above = int(10_000 * share * 0.98), int(10_000 * share * 1.02)
    for num_ids, best in ((below, "tensorcore"), (above, "sweep")):
        case = helpers.changed(many, num_ids=num_ids)
        assert dispatch.choices(case, None).on_tpu.implementation.name == best
        said = dispatch.explain(case, dispatch.choices(case, None), "tpu")
        assert f"from {share:.0%} on the sweep is faster" in said
        named = dispatch.choices(case, "tensorcore").on_tpu
        assert named.implementation.name == "tensorcore"


def test_a_large_batch_that_the_sweep_cannot_do_takes_the_best_of_the_others():
    many = helpers.changed(problem(WIDE), num_rows=1000, num_ids=1000)
    assert dispatch.choices(many, None).on_tpu.implementation.name == "sweep"
    each = helpers.changed(many, accumulate=False)
    assert dispatch.choices(each, None).on_tpu.implementation.name == "tensorcore"


def test_a_config_names_its_implementation_and_is_used():
    one = dispatch.choices(problem(WIDE), None, sweep.Config(16, 16)).on_tpu
    assert (one.implementation.name, one.config) == ("sweep", sweep.Config(16, 16))
    config = tensorcore.Config(rows_per_chunk=8)
    text = explain(*shapes(WIDE), config=config)
    assert "tensorcore Config(rows_per_chunk=8" in text
    state, ids, grads, _ = cases.arrays(WIDE)
    new = sparse_adam_update(*state, ids, grads, config=config)
    expected = sparse_adam_update(*state, ids, grads, implementation="xla")
    helpers.assert_close_states(new, state, helpers.as_float32(expected))
    with pytest.raises(TypeError, match="is of implementation='tensorcore', not of"):
        sparse_adam_update(*state, ids, grads, config=config, implementation="sweep")
    with pytest.raises(TypeError, match="must be the Config of one of the kernels"):
        sparse_adam_update(*state, ids, grads, config=cast(Any, "large"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (NARROW, "D=3 is not a multiple of 128"),
        (Case("", 40, 2**18, 8), "D=262144 is too large"),
        (Case("", 40, 128, 8, dtypes=cases.BFLOAT16), "table is bfloat16"),
        (Case("", 40, 128, 8, dtypes=cases.MIXED), "momenta is bfloat16"),
        (Case("", 40, 128, 8, options={"lazy_adam": False}), "lazy=False"),
    ],
)
def test_what_the_tensorcore_kernel_cannot_do(case, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda *arrays: sparse_adam_update(
                *arrays, implementation="tensorcore", **case.options
            ),
            *shapes(case),
        )
    assert words in explain(*shapes(case), **case.options)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"implementation='gpu' must be .*tensorcore"):
        dispatch.choices(problem(WIDE), "gpu")


def test_explain():
    lines = explain(*shapes(LARGE)).splitlines()
    assert lines[0] in ("here, on cpu: cpu, compiled", "here, on cpu: xla, compiled")
    assert lines[1] == "tpu: tensorcore, compiled"
    assert "bytes of VMEM on unknown" in lines[2]
    named = {line.split(":")[0].strip(): line for line in lines}
    assert set(dispatch.NAMES) <= set(named)
    assert "elsewhere interpreted, if named" in named["tensorcore"]
    assert named["xla"] == "  xla: can run this update anywhere"


@pytest.mark.parametrize(
    ("platform", "lead", "others"),
    [
        ("tpu", "here, on tpu: tensorcore, compiled", ["cpu", "elsewhere"]),
        ("cuda", "here, on cuda: xla, compiled", ["tpu", "cpu"]),
    ],
)
def test_explain_leads_with_the_platform_at_hand(monkeypatch, platform, lead, others):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    text = explain(*shapes(LARGE))
    lines = [line for line in text.splitlines() if not line.startswith(" ")]
    assert text.startswith(lead)
    assert [line.split(":")[0] for line in lines[1:]] == others


def test_explain_of_a_named_one():
    lines = explain(*shapes(WIDE), implementation="tensorcore").splitlines()
    assert "tpu: tensorcore, compiled" in lines
    assert "elsewhere: tensorcore, interpreted" in lines


def test_explain_runs_nothing_and_takes_what_the_op_takes():
    table = jax.ShapeDtypeStruct((2**24, 256), jnp.float32)
    ids = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    grads = jax.ShapeDtypeStruct((2**20, 256), jnp.float32)
    text = explain(table, table, table, ids, grads, learning_rate=0.1, clipvalue=1.0)
    assert "\ntpu: tensorcore, compiled\n" in text
    with pytest.raises(ValueError, match=r"epsilon=-1.0 must be positive"):
        explain(table, table, table, ids, grads, epsilon=-1.0)
