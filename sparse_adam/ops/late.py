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
    no_gradient: str,
) -> jex.core.Primitive:
    """Makes a primitive of a function that depends on the platform.

    Args:
        name: of the primitive.
        run: `run(platform, *arrays, **static)`, traced when the primitive is lowered,
            outside of any mesh, in 32 bits.
        results: `results(*types, **static)`: the types of what it returns.
        over_tables: `over_tables(arrays, axes, **static)`: its rule for `jax.vmap`.
        no_gradient: what to say when the primitive is differentiated.
    """
    primitive = jex.core.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(results)
    primitive.def_impl(functools.partial(_run_eagerly, primitive))
    for platform in (*PLATFORMS, None):
        lower = mlir.lower_fun(
            in_32_bits(functools.partial(_outside_of_meshes, run, platform)),
            multiple_results=True,
        )
        mlir.register_lowering(
            primitive, functools.partial(_lower, lower), platform=platform
        )
    batching.primitive_batchers[primitive] = over_tables

    def refuse(primals: Any, tangents: Any, **static: Any) -> Any:
        del primals, tangents, static
        raise TypeError(no_gradient)

    ad.primitive_jvps[primitive] = refuse
    return primitive


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


def _outside_of_meshes(
    run: Callable[..., Any], platform: str | None, *arrays: jax.Array, **static: Any
) -> Any:
    # But the device of the mesh in scope is what tells Pallas which TPU this is for.
    device = jax.sharding.get_abstract_mesh().abstract_device
    nowhere = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(nowhere):
        return run(platform, *arrays, **static)
