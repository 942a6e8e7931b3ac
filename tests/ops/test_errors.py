"""Bad input gets an error while tracing: the argument, its value and the way out."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparse_adam import plan_update, sparse_adam_update

TABLE = np.ones((10, 4), np.float32)
IDS = np.arange(6, dtype=np.int32)
GRADS = np.ones((6, 4), np.float32)
POSITIONAL = ("table", "momenta", "velocities", "ids", "grads")
GOOD = dict(zip(POSITIONAL, (TABLE, TABLE, TABLE, IDS, GRADS), strict=True))
NAN = float("nan")


@pytest.fixture(autouse=True)
def without_the_type_checker_of_the_tests():
    """A user has none, and its errors would come before the package's own."""
    disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", disabled)


SHAPES = [
    ({"table": TABLE[0]}, r"table.shape=\(4,\) must be \(V, D\)"),
    ({"table": TABLE[None]}, r"table.shape=\(1, 10, 4\) must be \(V, D\)"),
    ({"table": TABLE[:0]}, r"table.shape=\(0, 4\) must be \(V, D\), both at least 1"),
    ({"momenta": TABLE[:9]}, r"momenta.shape=\(9, 4\) must be table.shape=\(10, 4\)"),
    ({"velocities": TABLE[:, :3]}, r"velocities.shape=\(10, 3\) must be table.shape"),
    ({"velocities": TABLE[:, 0]}, r"velocities.shape=\(10,\) must be table.shape"),
    ({"grads": GRADS[:5]}, r"grads.shape=\(5, 4\) must be .*\(6, 4\).* sample_ids"),
    ({"grads": GRADS[:, :3]}, r"grads.shape=\(6, 3\) must be .*\(6, 4\)"),
    ({"grads": GRADS[None]}, r"grads.shape=\(1, 6, 4\) must be .*\(6, 4\)"),
    ({"ids": IDS[:, None]}, r"grads.shape=\(6, 4\) must be .*\(6, 1, 4\)"),
    (
        {"sample_ids": IDS, "grads": GRADS[None]},
        r"grads.shape=\(1, 6, 4\) must be \(B, 4\) with sample_ids",
    ),
    (
        {"sample_ids": IDS, "grads": GRADS[:, :3]},
        r"grads.shape=\(6, 3\) must be \(B, 4\) with sample_ids",
    ),
    (
        {"sample_ids": IDS, "grads": GRADS[:0]},
        r"grads.shape=\(0, 4\) must be .* B >= 1",
    ),
    ({"sample_ids": IDS[:5]}, r"sample_ids.shape=\(5,\) must be ids.shape=\(6,\)"),
    ({"gains": GRADS[:5, 0]}, r"gains.shape=\(5,\) must be ids.shape=\(6,\)"),
    ({"learning_rate": np.ones(2)}, r"learning_rate.* shape \(2,\).* pass a scalar"),
]

NUMBERS = [
    ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
    ({"epsilon": -1e-7}, "epsilon=-1e-07 must be positive"),
    ({"epsilon": NAN}, "epsilon=nan must be positive"),
    ({"epsilon": float("inf")}, "epsilon=inf must be finite"),
    ({"epsilon": 1e-19}, r"epsilon=1e-19: epsilon\*\*2 underflows .*at least 1.1e-19"),
    ({"epsilon": 1e-39, "sum_inside_sqrt": False}, "epsilon=1e-39 underflows"),
    ({"beta_1": 1.0}, "beta_1=1.0 must be >= 0 and < 1"),
    ({"beta_1": -0.1}, "beta_1=-0.1 must be >= 0 and < 1"),
    ({"beta_2": 1.5}, "beta_2=1.5 must be >= 0 and < 1"),
    ({"beta_2": NAN}, "beta_2=nan must be >= 0 and < 1"),
    ({"beta_2": 1 - 1e-9}, "beta_2=.* is 1 in float32: pass at most"),
    ({"clipvalue": -1.0}, r"clipvalue=-1.0 must be >= 0, or a pair \(low, high\)"),
    ({"clipvalue": NAN}, "clipvalue=nan must be >= 0"),
    ({"clipvalue": (2.0, 1.0)}, r"clipvalue\[0\]=2.0 is above clipvalue\[1\]=1.0"),
    ({"clipvalue": (NAN, 1.0)}, r"clipvalue\[0\]=nan must be a number, or None"),
    ({"clipvalue": (1.0,)}, r"clipvalue=\(1.0,\) must be a number or a pair"),
    (
        {"clip_weight_min": 1.0, "clip_weight_max": -1.0},
        "clip_weight_min=1.0 is above clip_weight_max=-1.0: exchange them",
    ),
    ({"clip_weight_max": NAN}, "clip_weight_max=nan must be a number, or None"),
    ({"clip_weight_min": NAN}, "clip_weight_min=nan must be a number, or None"),
    ({"weight_decay_factor": NAN}, "weight_decay_factor=nan must be finite"),
    ({"learning_rate": NAN}, "learning_rate=nan must be finite"),
    ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
]

MODES = [
    (
        {"use_gradient_accumulation": False, "lazy_adam": False},
        "lazy_adam=False, needs use_gradient_accumulation=True",
    ),
    (
        {"use_gradient_accumulation": False, "clipvalue": 1.0},
        "clipvalue=1.0 .* needs use_gradient_accumulation=True; or pass clipvalue=None",
    ),
    ({"implementation": "gpu"}, "implementation='gpu' must be None or one of .*xla"),
    (
        {"implementation": "tensorcore"},
        "implementation='tensorcore' cannot run this update: D=4 is not a multiple of "
        r"128.*Pass implementation=None, or one of \[.*'xla'\]",
    ),
    (
        {"plan": plan_update(IDS[:5], 10)},
        r"plan is for 5 ids of 10 rows, but .* 6 ids and 10 rows: pass plan_update",
    ),
    ({"plan": plan_update(IDS, 9)}, "plan is for 6 ids of 9 rows"),
]

TYPES = [
    ({"ids": IDS.astype(np.float32)}, r"ids.dtype=float32 must be an integer dtype"),
    ({"ids": IDS > 2}, "ids.dtype=bool must be an integer dtype"),
    ({"sample_ids": GRADS[:, 0]}, "sample_ids.dtype=float32 must be an integer dtype"),
    ({"gains": IDS}, "gains.dtype=int32 must be floating: pass float32"),
    ({"grads": GRADS.astype(int)}, "grads.dtype=int32 must be floating: pass float32"),
    (
        {"table": TABLE.astype(np.float16)},
        r"table.dtype=float16 must be float32 or bfloat16: pass table.astype",
    ),
    ({"momenta": TABLE.astype(np.int32)}, "momenta.dtype=int32 must be float32 or"),
    ({"learning_rate": lambda: 0.1}, r"callable: pass its value, learning_rate=sched"),
    ({"learning_rate": "0.1"}, "learning_rate='0.1' must be a real number"),
    ({"learning_rate": True}, "learning_rate=True must be a real number"),
    ({"learning_rate": None}, "learning_rate=None must be a real number"),
    ({"epsilon": "small"}, "epsilon='small' must be a number"),
    ({"beta_1": None}, "beta_1=None must be a number"),
    ({"clipvalue": [1.0, 2.0]}, r"clipvalue=\[1.0, 2.0\] must be a number"),
    ({"lazy_adam": 1}, "lazy_adam=1 must be True or False"),
    ({"sum_inside_sqrt": "yes"}, "sum_inside_sqrt='yes' must be True or False"),
    ({"use_gradient_accumulation": None}, "use_gradient_accumulation=None must be"),
]

ROWS = [
    *((ValueError, *row) for row in (*SHAPES, *NUMBERS, *MODES)),
    *((TypeError, *row) for row in TYPES),
]


def call(arguments):
    """The op on good arguments but for those given."""
    arguments = {**GOOD, **arguments}
    arrays = [arguments.pop(name) for name in POSITIONAL]
    return functools.partial(sparse_adam_update, **arguments), arrays


@pytest.mark.parametrize(("kind", "arguments", "words"), ROWS)
def test_error(kind, arguments, words):
    update, arrays = call(arguments)
    with pytest.raises(kind, match=words):
        update(*arrays)


@pytest.mark.parametrize(("kind", "arguments", "words"), ROWS)
def test_error_while_tracing(kind, arguments, words):
    update, arrays = call(arguments)
    with pytest.raises(kind, match=words):
        jax.eval_shape(update, *arrays)
    with pytest.raises(kind, match=words):
        jax.jit(update)(*arrays)


@pytest.mark.parametrize("name", ["beta_1", "epsilon", "clipvalue", "clip_weight_max"])
def test_only_the_rate_may_be_traced(name):
    def update(value):
        return sparse_adam_update(*GOOD.values(), **{name: value})

    with pytest.raises(TypeError, match=f"{name} is traced; only learning_rate"):
        jax.jit(update)(0.5)


def test_a_traced_rate_must_be_a_scalar():
    def update(rate):
        return sparse_adam_update(*GOOD.values(), learning_rate=rate)

    with pytest.raises(ValueError, match=r"learning_rate has shape \(2,\)"):
        jax.jit(update)(jnp.ones(2))


def test_the_good_arguments_are_good():
    update, arrays = call({})
    assert jax.eval_shape(update, *arrays).table.shape == TABLE.shape
