"""Telling what would run, and why."""

from collections.abc import Iterator
from typing import Any

import jax

from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import dispatch
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.sparse_adam import packed_adam_update, sparse_adam_update
from sparse_adam.ops.sparse_update import sparse_update
from sparse_adam.ops.travel import EXCHANGE, Travel
from sparse_adam.rules import UpdateRule


def explain(*args: Any, **kwargs: Any) -> str:
    """Tells which implementation an update would run, and why not the others.

    Takes the arguments of `sparse_adam_update`, `packed_adam_update` or
    `sparse_update`, as arrays or as `jax.ShapeDtypeStruct`s, traces the call and runs
    nothing. The platform of the mesh in scope, or JAX's default one, leads. Of a table
    that is spread over devices it tells what one of them does, and how the batch
    travels if it is routed: by which collectives, how many bytes, in how many rounds.

    Raises:
        TypeError: as the update would.
        ValueError: as the update would.

    Examples:
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
    spec: UpdateSpec, chosen: dispatch.Choices, here: str, routed: Any
) -> Iterator[str]:
    """Yields what is to be said of an update."""
    yield dispatch.explain(spec, chosen, here)
    if routed is None:
        return
    travel, by_samples = _travel(routed, spec)
    yield f"  the batch is routed: {travel.ids} (docs/routing.md)"
    yield f"  route: {travel.route}"
    yield travel.update
    if by_samples:
        yield (
            f"  gradients of samples: {travel.route}; up to {travel.num_ids:,} rows, "
            f"{4 * travel.num_ids * travel.dim:,} bytes"
        )
    yield travel.rounds
    yield EXCHANGE


def _travel(routed: Any, spec: UpdateSpec) -> tuple[Travel, bool]:
    """Returns how the batch of a `run_routed_update` travels, as its program says.

    Also returns whether gradients of samples travel to the ids.
    """
    inner = list(_equations(routed.params["jaxpr"].jaxpr))
    message = next(x for x in inner if x.primitive.name == "all_to_all")
    count = message.outvars[0].aval.shape[0]
    mapped = any(x.primitive.name == "shard_map" for x in inner)
    ids, _, *others = (x.aval for x in routed.invars[len(spec.layout.shapes) :])
    by_samples = mapped and any(
        x.dtype == ids.dtype and x.shape == ids.shape for x in others
    )
    num_ids = -(-ids.size // count) if mapped else ids.size
    return Travel(num_ids, count, spec.dim), by_samples


def _updates_in(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the updates of a program, and the equation that routes each, or None.

    Those in its loops and functions are included, and sums of gradients are not, which
    are updates of another kind.
    """
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == "run_routed_update":
            yield from (
                (x, eqn)
                for x in _equations(eqn.params["jaxpr"].jaxpr, _SUMS)
                if x.primitive.name == "sparse_update"
            )
            continue
        if eqn.primitive.name == "sparse_update":
            yield eqn, None
        for inner in _programs(eqn):
            yield from _updates_in(inner)


_SUMS = "run_update"  # what a routed update calls to sum gradients


def _equations(jaxpr: Any, leave_out: str | None = None) -> Iterator[Any]:
    """Yields the equations of a program and of those in it, but of one name."""
    for eqn in jaxpr.eqns:
        yield eqn
        if leave_out is None or eqn.params.get("name") != leave_out:
            for inner in _programs(eqn):
                yield from _equations(inner, leave_out)


def _programs(eqn: Any) -> Iterator[Any]:
    for inner in jax.tree.leaves(list(eqn.params.values())):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
            yield inner
