"""Operations whose programs are traced late: when they are lowered for a platform.

`lax.platform_dependent` traces a program for every platform and keeps one. A Pallas
kernel takes a second to trace, and a model has many tables, so the operations of this
package are primitives of JAX: what runs is chosen while tracing, by names and shapes,
but only the program of the platform at hand is ever traced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from sparse_adam.ops.integers import in_32_bits

PLATFORMS = ("tpu", "cpu")  # that are told apart; all others are None


def late_primitive(
    name: str,
    run: Callable[..., Sequence[jax.Array]],
    results: Callable[..., Sequence[Any]],
    over_tables: Callable[..., tuple[Sequence[jax.Array], Sequence[int]]],
    jvp: Callable[..., tuple[Sequence[Any], Sequence[Any]]],
    cut_by_xla: Sequence[str] = (),
) -> jex.core.Primitive:
    """Makes a primitive of a function that depends on the platform.

    Args:
        name: of the primitive.
        run: `run(platform, *arrays, **static)`, traced when the primitive is lowered,
            outside of any mesh, in 32 bits.
        results: `results(*types, **static)`: the types of what it returns.
        over_tables: `over_tables(arrays, axes, **static)`: its rule for `jax.vmap`.
        jvp: `jvp(primals, tangents, **static)`: its rule for derivatives, such as
            `no_gradient(why)`.
        cut_by_xla: platforms whose program XLA cannot cut into those of several
            devices. Where it would have to, `run` is told of no platform.
    """
    primitive = jex.core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(results)
    primitive.def_impl(functools.partial(_run_eagerly, primitive))
    lowers: dict[str | None, Callable[..., Any]] = {}
    for platform in (*PLATFORMS, None):
        lower = mlir.lower_fun(
            in_32_bits(functools.partial(_outside_of_meshes, run, platform)),
            multiple_results=True,
        )
        lowers[platform] = functools.partial(_lower, lower)
    for platform, lower in lowers.items():
        if platform in cut_by_xla:
            lower = functools.partial(_lower_either, lower, lowers[None])
        mlir.register_lowering(primitive, lower, platform=platform)
    batching.primitive_batchers[primitive] = over_tables
    ad.primitive_jvps[primitive] = jvp
    return primitive


def no_gradient(why: str) -> Callable[..., Any]:
    """Returns the rule of a primitive that cannot be differentiated, which says why."""

    def refuse(primals: Any, tangents: Any, **static: Any) -> Any:
        del primals, tangents, static
        raise TypeError(why)

    return refuse


def _run_eagerly(
    primitive: jex.core.Primitive, *arrays: jax.Array, **static: Any
) -> Sequence[jax.Array]:
    """Runs the primitive where no `jax.jit` is around it."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **static))(*arrays)


def _lower(lower: Callable[..., Any], context: Any, *args: Any, **static: Any) -> Any:
    """Lowers with types that say nothing of meshes.

    Within `jax.shard_map` a type says along which axes an array varies. Here each
    device has its own arrays, and a kernel knows of no other device.
    """
    types = [ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    return lower(context.replace(avals_in=types), *args, **static)


def _lower_either(
    whole: Callable[..., Any],
    in_parts: Callable[..., Any],
    context: Any,
    *args: Any,
    **static: Any,
) -> Any:
    """Lowers what XLA can cut in parts, where the program is for several devices.

    Within `jax.shard_map` it is for one, and its context has no number of devices.
    """
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    lower = in_parts if devices > 1 else whole
    return lower(context, *args, **static)


def _outside_of_meshes(
    run: Callable[..., Any], platform: str | None, *arrays: jax.Array, **static: Any
) -> Any:
    # But the device of the mesh in scope is what tells Pallas which TPU this is for.
    device = jax.sharding.get_abstract_mesh().abstract_device
    nowhere = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(nowhere):
        return run(platform, *arrays, **static)
