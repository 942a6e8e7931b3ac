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
import jax.export
import jax.extend as jex
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from sparse_adam.ops import automatic
from sparse_adam.ops.integers import in_32_bits

PLATFORMS = ("tpu", "cpu")  # that are told apart; all others are None


def late_primitive(
    name: str,
    run: Callable[..., Sequence[jax.Array]],
    results: Callable[..., Sequence[Any]],
    over_tables: Callable[..., tuple[Sequence[jax.Array], Sequence[int]]],
    jvp: Callable[..., tuple[Sequence[Any], Sequence[Any]]],
    over_devices: automatic.Partition | None = None,
) -> Callable[..., list[jax.Array]]:
    """Makes a primitive of a function that depends on the platform.

    Returns:
        `bind(*arrays, **static)`, which puts it into the program at hand.

    Args:
        name: of the primitive.
        run: `run(platform, *arrays, **static)`, traced when the primitive is lowered,
            outside of any mesh, in 32 bits.
        results: `results(*types, **static)`: the types of what it returns.
        over_tables: `over_tables(arrays, axes, **static)`: its rule for `jax.vmap`.
        jvp: `jvp(primals, tangents, **static)`: its rule for derivatives, such as
            `no_gradient(why)`.
        over_devices: how it is cut between devices, where XLA does that. None: XLA cuts
            what `run` does where it is told of no platform.
    """
    primitive = jex.core.Primitive(name)
    primitive.multiple_results = True

    def bind(*arrays: jax.Array, **static: Any) -> list[jax.Array]:
        needs = automatic.NEEDS_DEVICES if automatic.is_automatic() else None
        return primitive.bind(*arrays, needs=needs, device=_device(), **static)

    primitive.def_abstract_eval(_without_place(results))
    primitive.def_impl(functools.partial(_run_eagerly, primitive))
    lowers = {
        platform: mlir.lower_fun(
            in_32_bits(functools.partial(_outside_of_meshes, run, platform)),
            multiple_results=True,
        )
        for platform in (*PLATFORMS, None)
    }
    for platform in lowers:
        mlir.register_lowering(
            primitive,
            functools.partial(_lower, platform, lowers, bind, over_devices),
            platform=platform,
        )
    batching.primitive_batchers[primitive] = _without_place(over_tables)
    ad.primitive_jvps[primitive] = _without_place(jvp)
    return bind


def no_gradient(why: str) -> Callable[..., Any]:
    """Returns the rule of a primitive that cannot be differentiated, which says why."""

    def refuse(primals: Any, tangents: Any, **static: Any) -> Any:
        del primals, tangents, static
        raise TypeError(why)

    return refuse


def _without_place(rule: Callable[..., Any]) -> Callable[..., Any]:
    def of_the_others(*args: Any, needs: Any, device: Any, **static: Any) -> Any:
        del needs, device
        return rule(*args, **static)

    return of_the_others


def _device() -> Any:
    """The device of the mesh in scope, which tells Pallas which TPU this is for."""
    return jax.sharding.get_abstract_mesh().abstract_device


def _outside(device: Any) -> Any:
    """A context without a mesh, but with its device."""
    nowhere = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(nowhere)


def _run_eagerly(
    primitive: jex.core.Primitive, *arrays: jax.Array, **static: Any
) -> Sequence[jax.Array]:
    """Runs the primitive where no `jax.jit` is around it."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(primitive.bind, **static))(*arrays)


def _lower(
    platform: str | None,
    lowers: dict[str | None, Callable[..., Any]],
    bind: Callable[..., Any],
    over_devices: automatic.Partition | None,
    context: Any,
    *args: Any,
    needs: Any,
    device: Any,
    **static: Any,
) -> Any:
    """Lowers with types that say nothing of meshes.

    Within `jax.shard_map` a type says along which axes an array varies. Here each
    device has its own arrays, and a kernel knows of no other device.
    """
    del needs
    device = _device() or device
    types = [ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    context = context.replace(avals_in=types)
    told = None if _is_portable(context, platform) else platform
    if over_devices is None:
        told = None if automatic.is_cut_by_xla(context) else told
        return lowers[told](context, *args, device=device, **static)
    if not automatic.is_partitioned(context, platform):
        return lowers[told](context, *args, device=device, **static)
    scope = functools.partial(_outside, device)
    cut = automatic.partitioned(bind, over_devices, types, static, scope)
    return mlir.lower_fun(cut, multiple_results=True)(context, *args)


def _is_portable(context: Any, platform: str | None) -> bool:
    """Returns whether an operation must be lowered to what XLA itself can do.

    A program that `jax.export` makes for a CPU may run without the C++ library. And
    kernels are cut by sizes, which the symbolic ones of an export do not tell.
    """
    is_exported = context.module_context.lowering_parameters.for_export
    types = (*context.avals_in, *context.avals_out)
    return (is_exported and platform == "cpu") or any(
        jax.export.is_symbolic_dim(size) for x in types for size in x.shape
    )


def _outside_of_meshes(
    run: Callable[..., Any],
    platform: str | None,
    *arrays: jax.Array,
    device: Any,
    **static: Any,
) -> Any:
    with _outside(device):
        return run(platform, *arrays, **static)
