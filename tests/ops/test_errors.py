"""Bad input gets an error while tracing: the argument, its value and the way out."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparse_adam import (
    PackedTable,
    lookup,
    packed_adam_update,
    plan_update,
    sparse_adam_update,
)
from tests import helpers

TABLE = np.ones((10, 4), np.float32)
IDS = np.arange(6, dtype=np.int32)
GRADS = np.ones((6, 4), np.float32)
STATE = (TABLE, TABLE, TABLE)
POSITIONAL = ("table", "momenta", "velocities", "ids", "grads")
GOOD = dict(zip(POSITIONAL, (*STATE, IDS, GRADS), strict=True))
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
    ({"ids": None}, "ids=None must be an array of integers"),
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


class Foreign:
    """A tensor of another package: NumPy does not know its dtype."""

    def __init__(self, array, *protocols):
        self.array, self.shape, self.dtype = array, array.shape, "torch.int64"
        self.protocols = protocols

    def __array__(self, dtype=None, copy=None):
        if "array" not in self.protocols:
            raise TypeError("cannot convert a tensor of another device")
        return self.array

    def __dlpack__(self, **options):
        if "dlpack" not in self.protocols:
            raise RuntimeError("cannot export a tensor that requires a gradient")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("protocol", ["array", "dlpack"])
def test_tensors_of_other_packages_are_taken(protocol):
    weights = {"sample_ids": IDS[::-1].copy(), "gains": GRADS[:, 0]}
    expected = sparse_adam_update(*GOOD.values(), **weights)
    ids, grads, *others = (
        cast(Any, Foreign(x, protocol)) for x in (IDS, GRADS, *weights.values())
    )
    foreign = dict(zip(weights, others, strict=True))
    new = sparse_adam_update(*STATE, ids, grads, **foreign)
    helpers.assert_states_bitwise_equal(new, expected)
    plan = plan_update(ids, 10)
    assert plan.ids.tolist() == IDS.tolist() and plan.is_of(ids)
    packed = PackedTable.pack(*STATE)
    for table in (TABLE, packed):
        helpers.assert_bitwise_equal(lookup(table, ids), TABLE[:6])


def test_tensors_that_cannot_be_converted_are_an_error():
    with pytest.raises(TypeError, match=r"ids is a Foreign that NumPy .* detached"):
        sparse_adam_update(*STATE, cast(Any, Foreign(IDS)), GRADS)
    with pytest.raises(TypeError, match=r"table is a .*Foreign.* jnp.from_dlpack\(tab"):
        table = cast(Any, Foreign(TABLE, "array"))
        sparse_adam_update(table, TABLE, TABLE, IDS, GRADS)


def test_a_list_has_no_astype():
    with pytest.raises(TypeError, match=r"ids.dtype=float64 .*np.array\(ids\).astype"):
        sparse_adam_update(*STATE, cast(Any, []), GRADS[:0])


def test_more_rows_than_int32_can_number():
    table = jax.ShapeDtypeStruct((2**31, 4), jnp.float32)
    words = r"V=2147483648 rows .*must be below 2\*\*31.*: split the table"
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(sparse_adam_update, table, table, table, IDS, GRADS)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lookup, table, IDS)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(PackedTable.lookup, packed, IDS)


def test_numpy_leaves_of_packed_tables_and_plans():
    packed = PackedTable.pack(*STATE)
    expected = packed_adam_update(packed, IDS, GRADS)
    leaves = jax.tree.map(np.asarray, (packed, plan_update(IDS, 10)))
    new = packed_adam_update(leaves[0], IDS, GRADS, plan=leaves[1])
    helpers.assert_bitwise_equal(new.lines, expected.lines)
    helpers.assert_bitwise_equal(leaves[0].lookup(IDS), TABLE[:6])


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
