"""Which implementation runs, and how it is told."""

import jax
import jax.numpy as jnp
import pytest

from sparse_adam import explain, sparse_adam_update
from sparse_adam.ops import dispatch
from tests import cases, helpers
from tests.cases import CASES, Case

PROBLEMS = [
    pytest.param(helpers.problem(case, cases.arrays(case)), id=case.name)
    for case in CASES
]
WIDE = Case("wide", 40, 128, 24)
NARROW = Case("narrow", 40, 3, 24)


def shapes(case):
    state, ids, grads, _ = cases.arrays(case)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*state, ids, grads)
    )


def problem(case):
    return helpers.problem(case, cases.arrays(case))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_none_takes_the_first_that_is_compiled_there_and_able(problem):
    chosen = dispatch.choices(problem, None)
    for platform, one in chosen._asdict().items():
        platform = platform.removeprefix("on_")
        able = [
            other
            for other in dispatch.IMPLEMENTATIONS
            if other.compiled_on(platform) and other.unsupported(problem) is None
        ]
        assert one is able[0]


@pytest.mark.parametrize("name", dispatch.NAMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_named_one_is_taken_or_refused(problem, name):
    one = dispatch.IMPLEMENTATIONS[dispatch.NAMES.index(name)]
    reason = one.unsupported(problem)
    if reason is None:
        assert set(dispatch.choices(problem, name)) == {one}
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
    for param in PROBLEMS:
        assert last.unsupported(*param.values) is None


def test_the_best_on_a_tpu():
    assert dispatch.choices(problem(WIDE), None).on_tpu.name == "tensorcore"
    assert dispatch.choices(problem(NARROW), None).on_tpu.name == "xla"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (NARROW, "D=3 is not a multiple of 128"),
        (Case("", 40, 2**18, 8), "D=262144 is too large"),
        (Case("", 40, 128, 8, dtypes=cases.BFLOAT16), "table is bfloat16"),
        (Case("", 40, 128, 8, dtypes=cases.MIXED), "momenta is bfloat16"),
        (Case("", 40, 128, 8, options={"lazy_adam": False}), "lazy_adam=False"),
        (
            Case("", 40, 128, 8, options={"use_gradient_accumulation": False}),
            "use_gradient_accumulation=False",
        ),
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
    text = explain(*shapes(case), **case.options)
    assert words in text
    assert text.startswith("tpu: xla, compiled")


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"implementation='gpu' must be .*tensorcore"):
        dispatch.choices(problem(WIDE), "gpu")


def test_explain():
    lines = explain(*shapes(WIDE)).splitlines()
    assert lines[0] == "tpu: tensorcore, compiled"
    named = {line.split(":")[0].strip(): line for line in lines}
    assert set(dispatch.NAMES) <= set(named)
    assert "elsewhere interpreted, if named" in named["tensorcore"]
    assert named["xla"] == "  xla: can run this update anywhere"


def test_explain_of_a_named_one():
    lines = explain(*shapes(WIDE), implementation="tensorcore").splitlines()
    assert "tpu: tensorcore, compiled" in lines
    assert "elsewhere: tensorcore, interpreted" in lines


def test_explain_runs_nothing_and_takes_what_the_op_takes():
    table = jax.ShapeDtypeStruct((2**24, 256), jnp.float32)
    ids = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    grads = jax.ShapeDtypeStruct((2**20, 256), jnp.float32)
    text = explain(table, table, table, ids, grads, learning_rate=0.1, clipvalue=1.0)
    assert text.startswith("tpu: tensorcore, compiled")
    with pytest.raises(ValueError, match=r"epsilon=-1.0 must be positive"):
        explain(table, table, table, ids, grads, epsilon=-1.0)
