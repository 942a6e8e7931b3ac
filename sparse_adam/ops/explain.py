"""Telling what would run, and why."""

from collections.abc import Iterator
from typing import Any

import jax

from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import dispatch
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.sparse_adam import packed_adam_update, sparse_adam_update
from sparse_adam.ops.sparse_update import sparse_update
from sparse_adam.rules import UpdateRule


def explain(*args: Any, **kwargs: Any) -> str:
    """Tells which implementation an update would run, and why not the others.

    Takes the arguments of `sparse_adam_update`, `packed_adam_update` or
    `sparse_update`, as arrays or as `jax.ShapeDtypeStruct`s, traces the call and runs
    nothing. The platform of the mesh in scope, or JAX's default one, leads. Of a table
    that is spread over devices it tells what one of them does, and how many ids arrive
    there if the batch is routed (docs/routing.md).

    Raises:
        TypeError: as the update would.
        ValueError: as the update would.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> table = jax.ShapeDtypeStruct((1_000_000, 128), jnp.bfloat16)
        >>> ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
        >>> grads = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
        >>> print(explain(table, table, table, ids, grads)) # doctest: +ELLIPSIS
        here, on cpu: ..., compiled
        tpu: sweep, compiled
          sweep Config(...) takes ... bytes of VMEM on ...
        elsewhere: xla, compiled
          sparsecore: table is bfloat16; rows move one by one, ...
          tensorcore: table is bfloat16; rows move one by one, ...
          sweep: compiled on tpu; elsewhere interpreted, if named
          cpu: ...
          xla: can run this update anywhere
    """
    update = _function_of(args, kwargs)
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def call(arrays: list[Any]) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        own_args, own_kwargs = jax.tree.unflatten(structure, list(filled.values()))
        return update(*own_args, **own_kwargs)

    jaxpr = jax.make_jaxpr(call)([leaves[i] for i in places])
    device = jax.sharding.get_abstract_mesh().abstract_device
    here = device.platform if device is not None else jax.default_backend()
    said = [
        line
        for eqn, routed in _updates_in(jaxpr.jaxpr)
        for line in _lines(eqn.params["spec"], eqn.params["chosen"], here, routed)
    ]
    return "\n".join(said) or "nothing to do: there are no ids, and the update is lazy"


def _function_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the function whose arguments these are."""
    if any(isinstance(x, UpdateRule) for x in (*args, *kwargs.values())):
        return sparse_update
    first = args[0] if args else kwargs.get("packed")
    return packed_adam_update if isinstance(first, PackedTable) else sparse_adam_update


def _lines(
    spec: UpdateSpec, chosen: dispatch.Choices, here: str, routed: bool
) -> Iterator[str]:
    """Yields what is to be said of an update."""
    yield dispatch.explain(spec, chosen, here)
    if routed:
        yield (
            "  the batch is routed: ids and summed gradients travel to the owners of "
            f"the rows, in rounds of up to {spec.num_ids:,} to each"
        )


def _updates_in(jaxpr: Any, routed: bool = False) -> Iterator[tuple[Any, bool]]:
    """Yields the updates of a program, and whether their batches are routed.

    Those in its loops and functions are included.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sparse_update":
            yield eqn, routed
        within = routed or eqn.params.get("name") == "run_routed_update"
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _updates_in(inner, within)
