"""The operations that rules may use, compiled by libtpu: each of them, in a kernel.

The tables of `sparse_adam.rules.operations` say what kernels can compute. No TPU is
needed to hold them to it; libtpu compiles on any host.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_adam.kernels.sparsecore.roots import ensure_roots
from sparse_adam.rules import operations
from tests.kernels.topology import four_chips

F32, I32 = jnp.float32, jnp.int32


def bits(x):
    return lax.bitcast_convert_type(x, I32)


def from_bits(x):
    return lax.bitcast_convert_type(x, F32)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (twice(x), None), lambda _, g: (2 * g,))


def over_rows(function):
    return lambda x: x * function(x, axis=-1, keepdims=True).astype(F32)


def chosen(condition):
    return lambda x: jnp.where(condition(x), x, -x)


# Of every primitive a function that uses it.
USES = {
    "abs": jnp.abs,
    "add": lambda x: x + 1,
    "and": chosen(lambda x: (x > 0) & (x < 1)),
    "bitcast_convert_type": lambda x: from_bits(bits(x)),
    "ceil": jnp.ceil,
    "clamp": lambda x: lax.clamp(-1.0, x, 1.0),
    "convert_element_type": lambda x: x.astype(I32).astype(F32),
    "cos": jnp.cos,
    "div": lambda x: 1 / x,
    "eq": chosen(lambda x: x == 1),
    "erf": lax.erf,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "floor": jnp.floor,
    "ge": chosen(lambda x: x >= 1),
    "gt": chosen(lambda x: x > 1),
    "integer_pow": lambda x: x**3,
    "is_finite": chosen(jnp.isfinite),
    "le": chosen(lambda x: x <= 1),
    "log": jnp.log,
    "log1p": jnp.log1p,
    "logistic": lax.logistic,
    "lt": chosen(lambda x: x < 1),
    "max": lambda x: jnp.maximum(x, 0.0),
    "min": lambda x: jnp.minimum(x, 0.0),
    "mul": lambda x: x * x,
    "ne": chosen(lambda x: x != 1),
    "neg": lambda x: -x,
    "nextafter": lambda x: lax.nextafter(x, -x),
    "not": chosen(lambda x: ~(x > 1)),
    "or": chosen(lambda x: (x > 1) | (x < 0)),
    "pow": lambda x: jnp.abs(x) ** 0.3,
    "rem": lambda x: lax.rem(x, jnp.full_like(x, 2)),
    "round": jnp.round,
    "rsqrt": lax.rsqrt,
    "select_n": lambda x: lax.select(x > 0, x, -x),
    "shift_left": lambda x: from_bits(bits(x) << 1),
    "shift_right_arithmetic": lambda x: from_bits(bits(x) >> 1),
    "shift_right_logical": lambda x: from_bits(lax.shift_right_logical(bits(x), 1)),
    "sign": jnp.sign,
    "sin": jnp.sin,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "stop_gradient": lax.stop_gradient,
    "sub": lambda x: x - 1,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "xor": chosen(lambda x: (x > 1) ^ (x < 2)),
    "reduce_sum": over_rows(jnp.sum),
    "reduce_max": over_rows(jnp.max),
    "reduce_min": over_rows(jnp.min),
    "reduce_and": over_rows(lambda x, **axes: jnp.all(x > 0, **axes)),
    "reduce_or": over_rows(lambda x, **axes: jnp.any(x > 0, **axes)),
    "jit": jax.jit(lambda x: x * 2),
    "custom_jvp_call": jax.nn.relu,
    "custom_vjp_call": twice,
    "broadcast_in_dim": lambda x: x + jnp.full_like(x, 2),
}
# Some more, of operations that look different with other arguments.
MORE = {
    "norm": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "norm_of_rows": lambda x: x / jnp.linalg.norm(x, axis=-1)[:, None],
    "sum_of_integers": over_rows(lambda x, **axes: jnp.sum(x.astype(I32), **axes)),
    "var": over_rows(jnp.var),
    "softmax": jax.nn.softmax,
    "reciprocal": lambda x: x**-1,
    "integer_quotient": lambda x: (x.astype(I32) // 3).astype(F32),
    "unsigned": lambda x: x.astype(jnp.uint32).astype(F32),
    "clip": lambda x: jnp.clip(x, -1.0, 1.0),
    "nan_to_num": jnp.nan_to_num,
}


def names_in(function, shape):
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, F32)).jaxpr
    return {eqn.primitive.name for eqn in operations.equations(jaxpr)}


def compile_on(mesh, call, *shapes):
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(shape, F32, sharding=replicated) for shape in shapes
        ]
        jax.jit(call).lower(*arguments).compile()


@pytest.fixture(scope="module")
def chips():
    """Meshes of one device, without and with SparseCores."""
    meshes = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("v5e:2x2", "v6e:2x2"):
            devices = four_chips(monkeypatch, name, AxisType.Explicit).devices
            meshes[name] = Mesh(devices[:1], ("one",), axis_types=(AxisType.Explicit,))
        yield meshes


def test_every_operation_of_the_tables_is_compiled():
    listed = operations.ELEMENTWISE | operations.REDUCTIONS | operations.CALLS
    assert set(USES) == (listed - {"pjit"}) | {"broadcast_in_dim"}
    assert set(operations.SUBCORE) - {"pjit"} <= set(USES)
    for name, function in USES.items():
        assert name in names_in(function, (8, 128)), name


def subcore_call(function, lanes):
    def kernel(x, out, scratch):
        pltpu.sync_copy(x, scratch)
        scratch[...] = function(scratch[...])
        pltpu.sync_copy(scratch, out)

    return pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((lanes,), F32),
        mesh=plsc.VectorSubcoreMesh(
            core_axis_name="core",
            subcore_axis_name="subcore",
            num_cores=2,
            num_subcores=16,
        ),
        scratch_types=[pltpu.VMEM((lanes,), F32)],
        compiler_params=pltpu.CompilerParams(
            needs_layout_passes=False, use_tc_tiling_on_sc=False
        ),
    )


def all_of(functions):
    """Adds up what the functions return: one kernel, since compiling takes long."""
    return lambda x: sum((function(x) for function in functions), x)


# Operations that there are of the learning rate alone, which is a scalar.
SCALARS = {
    name
    for name in operations.ELEMENTWISE - {"pow"}
    if name in names_in(USES[name], ())
}
SUBCORE = operations.SUBCORE - {"pjit"}
SUBCORE_SCALARS = SUBCORE & SCALARS - operations.SUBCORE_VECTORS


def test_there_are_scalars_of_all_but_a_few():
    assert SCALARS.issuperset(operations.ELEMENTWISE - {"pow"})


def test_a_tensorcore_has_them(chips):
    function = all_of([*USES.values(), *MORE.values()])
    of_scalar = all_of([USES[name] for name in sorted(SCALARS)])

    def kernel(rate, x, out):
        out[...] = of_scalar(rate[0]) * function(x[...])

    spaces = (pltpu.SMEM, pltpu.VMEM)
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), F32),
        in_specs=[pl.BlockSpec(memory_space=space) for space in spaces],
    )
    compile_on(chips["v5e:2x2"], call, (1,), (8, 128))


def test_a_vector_subcore_has_them(chips):
    ensure_roots()
    function = all_of([USES[name] for name in sorted(SUBCORE)])
    of_scalar = all_of([USES[name] for name in sorted(SUBCORE_SCALARS)])
    with jax.set_mesh(chips["v6e:2x2"]):
        call = subcore_call(lambda x: of_scalar(x[0]) * function(x), 8)
    compile_on(chips["v6e:2x2"], call, (8,))
