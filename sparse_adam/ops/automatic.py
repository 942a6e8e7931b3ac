"""Automatic axes of a mesh: operations that tell XLA how to be cut between devices.

The type of an array says nothing of automatic axes, those of `jax.sharding.Mesh`. How
its rows are spread is known only when XLA has spread the whole program; then it asks
each operation in what form it wants its operands, and what one device does with them.
The compiler for TPUs does not ask.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam.ops.integers import in_32_bits


class Cut(NamedTuple):
    """What one device does of an operation, and how the arrays are spread for it.

    Attributes:
        run: of a device's parts of the operands, its parts of the results.
        operands: how each of them is spread.
        results: how each of them is spread.
    """

    run: Callable[..., Sequence[jax.Array]]
    operands: Sequence[PartitionSpec]
    results: Sequence[PartitionSpec]


class Partition(NamedTuple):
    """How an operation is cut.

    Attributes:
        rule: `rule(*types, **static)`, which dimensions are spread alike, as
            `jax.experimental.custom_partitioning` writes it: a string, and the sizes
            of its factors.
        cut: `cut(mesh, specs, **static)`, for operands that are so spread. Each spec is
            as long as its array has dimensions.
    """

    rule: Callable[..., tuple[str, dict[str, int]]]
    cut: Callable[..., Cut]


def _program_that_needs_devices() -> Any:
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(lambda *_: None, sharding_rule="->")
    return jax.make_jaxpr(identity)(np.float32(0))


# JAX tells an operation the devices of a program only if it has a parameter like this.
NEEDS_DEVICES = _program_that_needs_devices()


def is_automatic() -> bool:
    """Returns whether, while tracing, it is left to XLA which device does what."""
    return not jax.sharding.get_abstract_mesh().manual_axes


def is_partitioned(context: Any, platform: str | None) -> bool:
    """Returns whether an operation is lowered for several devices, to be cut by XLA.

    Raises:
        ValueError: it is within a `jax.shard_map` that leaves some axes automatic, or
            the compiler does not ask how to cut it.
    """
    axes = context.module_context.axis_context
    if not hasattr(axes, "num_devices"):
        _check_all_manual(axes)
        return False
    if axes.num_devices == 1:
        return False
    if platform == "tpu":
        raise ValueError(
            f"this program runs on {axes.num_devices} TPUs over automatic axes, and "
            "their compiler does not ask how a table is spread: pass "
            "sharding=table.sharding to the operation (of a table that every device "
            "has whole: NamedSharding(mesh, PartitionSpec())), or make the mesh by "
            "jax.make_mesh, whose axes are explicit, or call this in jax.shard_map"
        )
    if _program_that_needs_devices().eqns[0].params["sharding_rule"] is None:
        raise ValueError(
            "jax_use_shardy_partitioner=False, and JAX's older partitioner takes no "
            "rule for how rows are spread: leave it True, or call this within "
            "jax.shard_map"
        )
    return True


def is_cut_by_xla(context: Any) -> bool:
    """Returns whether XLA divides an operation that is lowered between devices."""
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices > 1
    return bool(_left_automatic(axes))


def _left_automatic(axes: Any) -> list[str]:
    """Returns the axes of more than one device that a `jax.shard_map` is not over."""
    names = (x for x in axes.mesh.axis_names if x not in axes.manual_axes)
    return [x for x in names if axes.mesh.shape[x] > 1]


def _check_all_manual(axes: Any) -> None:
    left = _left_automatic(axes)
    if left:
        raise ValueError(
            f"within jax.shard_map over axis_names={set(axes.manual_axes)} the axes "
            f"{left} of the mesh are automatic, and a table would be gathered over "
            "them: pass no axis_names to jax.shard_map, so that all axes are manual"
        )


def partitioned(
    bind: Callable[..., Any],
    partition: Partition,
    types: Sequence[Any],
    static: dict[str, Any],
    scope: Callable[[], Any],
) -> Callable[..., Any]:
    """Returns an operation that XLA cuts between devices as it is told.

    Args:
        bind: the operation on the whole arrays.
        partition: how to cut it.
        types: of the whole arrays.
        static: its parameters.
        scope: makes the context in which to trace what one device does.
    """

    def divide(mesh: Any, operands: Sequence[Any], results: Any) -> Any:
        del results
        if mesh.empty:
            raise ValueError(
                f"arrays have the sharding {operands[0].sharding}, which names no axes "
                "of a mesh: spread them by a jax.sharding.NamedSharding"
            )
        specs = [
            PartitionSpec(*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
            for x in operands
        ]
        run, of_operands, of_results = partition.cut(mesh, specs, **static)

        def run_in_scope(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with scope():
                return tuple(in_32_bits(run)(*arrays))

        return mesh, run_in_scope, named(mesh, of_results), named(mesh, of_operands)

    def named(mesh: Any, specs: Sequence[PartitionSpec]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    sizes: dict[str, Any]
    rule, sizes = partition.rule(*types, **static)
    whole = custom_partitioning(lambda *arrays: tuple(bind(*arrays, **static)))
    whole.def_partition(divide, sharding_rule=rule, **sizes)
    return whole
