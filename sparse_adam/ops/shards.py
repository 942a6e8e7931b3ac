"""Tables whose rows are spread over devices: every device updates its own.

A shard of a table is a table, and ids outside a table are ignored. So each device runs
the kernel on its rows with the whole batch, and nothing of the table is sent. XLA could
not do that by itself, since it cannot cut a kernel in two. JAX tells where the rows are
if the axes of the mesh are explicit (those of `jax.make_mesh` are), or if the table is
no tracer. If the axes are automatic, a user says it by `sharding=`, or XLA does, later
and not on a TPU (`automatic`). Inside `jax.shard_map` a caller has seen to it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam._types import Indices

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
    """The devices that share the rows of a table.

    Attributes:
        mesh: all of whose axes are explicit.
        axes: those over which the rows are spread; along others they are repeated.
    """

    mesh: Any
    axes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, array: Any, told: Any = None) -> "Shards | None":
        """Those that an array or a user tells of; None where neither tells of any.

        Args:
            name: of the array, for messages.
            array: whose rows they share.
            told: `sharding=` of the operation, or None.

        Raises:
            TypeError: `told` is no sharding.
            ValueError: columns are spread, or no mesh is in scope for what is told.
        """
        sharding = explicit_sharding(array)
        if sharding is None and told is not None:
            sharding = _of_user(told)
        if sharding is None:
            sharding = known_sharding(array)
        if sharding is None:
            # An array from before `jax.set_mesh` is one that every device has.
            mesh = jax.sharding.get_abstract_mesh()
            return cls(mesh, ()) if _is_explicit(mesh) else None
        return cls.by(name, sharding.mesh, sharding.spec)

    @classmethod
    def by(cls, name: str, mesh: Any, spec: PartitionSpec) -> "Shards":
        """Those of a table that is so spread.

        Raises:
            ValueError: its columns are spread.
        """
        rows, *columns = (*spec, None, None)
        if any(axis is not None for axis in columns):
            raise ValueError(
                f"{name} has the sharding {spec}: spread its rows, not its columns, as "
                f"{PartitionSpec(mesh.axis_names)} does"
            )
        if rows is None:
            return cls(mesh, ())
        return cls(mesh, rows if isinstance(rows, tuple) else (rows,))

    @property
    def rows(self) -> PartitionSpec:
        """How rows are spread."""
        return PartitionSpec(self.axes or None)

    @property
    def count(self) -> int:
        """Into how many parts the rows are cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def is_inside(self) -> bool:
        """Returns whether this is traced in a `jax.shard_map` over these axes.

        Raises:
            ValueError: it is in one over some of the axes only.
        """
        return is_inside(self.axes)

    def own(self, ids: Indices, num_rows: int) -> Indices:
        """Ids as rows of this device: -1 where they are of another one."""
        if not self.axes:
            return ids
        mine = ids - lax.axis_index(self.axes) * num_rows
        return jnp.where((mine >= 0) & (mine < num_rows), mine, -1)

    def on_each(self, function: Callable[..., Any], tables: Any, *others: Any) -> Any:
        """`function(tables, *others)` on every device: its rows, and all of the others.

        The results are rows of tables, too.
        """
        operands = self.rows, *_whole(others)
        return self.map(function, operands, self.rows)(tables, *others)

    def sum_of_each(
        self, function: Callable[..., jax.Array], tables: Any, *others: Any
    ) -> jax.Array:
        """The sum over the devices of what the function makes of their rows."""

        def part(tables: Any, *others: Any) -> jax.Array:
            return self.sum(function(tables, *others))

        operands = self.rows, *_whole(others)
        return self.map(part, operands, PartitionSpec())(tables, *others)

    def sum(self, found: jax.Array) -> jax.Array:
        """The sum over the devices of what each of them found."""
        return lax.psum(found, self.axes) if self.axes else found

    def map(
        self,
        function: Callable[..., Any],
        operands: tuple[Any, ...],
        results: PartitionSpec,
    ) -> Callable[..., Any]:
        """The function on every device, of arrays that are spread as `operands` say.

        In a `jax.shard_map` over the axes each device calls it with what it has.
        """
        if self.is_inside:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=operands,
            out_specs=results,
            # JAX's interpreter of kernels does not know which values vary.
            check_vma=False,
        )


def is_inside(axes: Sequence[str]) -> bool:
    """Returns whether this is traced in a `jax.shard_map` over all of these axes.

    Raises:
        ValueError: it is in one over some of the axes only.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    missing = [axis for axis in axes if axis not in manual]
    if missing and len(missing) < len(axes):
        raise ValueError(
            f"within jax.shard_map over the axes {sorted(manual)}, a table that is "
            f"spread over {tuple(axes)} can be used only if all of these are among "
            "them, or none"
        )
    return bool(manual) and not missing


def _whole(arrays: tuple[Any, ...]) -> tuple[PartitionSpec, ...]:
    return (PartitionSpec(),) * len(arrays)


def check_alike(names: Sequence[str], shardings: Sequence[Any]) -> None:
    """Refuses slots whose rows are spread otherwise than those of their table.

    Args:
        names: of the table and its slots.
        shardings: of each a `NamedSharding`, or None where it is not known.

    Raises:
        ValueError: they are, or columns are spread.
    """
    table, *slots = shardings
    if table is None:
        return
    shards = Shards.by(names[0], table.mesh, table.spec)
    for name, slot in zip(names[1:], slots, strict=False):  # a packed table has none
        if slot is None or slot is table:
            continue
        own = Shards.by(name, slot.mesh, slot.spec)
        if own != shards:
            raise ValueError(
                f"{name} has the sharding {slot.spec} on {slot.mesh}, but {names[0]} "
                f"has {table.spec} on {table.mesh}: spread the rows of both alike, by "
                f"{name} = jax.device_put({name}, {names[0]}.sharding)"
            )


def known_sharding(x: Any) -> Any:
    """How an array is spread, where its type tells or it is no tracer, else None."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x)
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _of_user(sharding: Any) -> NamedSharding:
    if isinstance(sharding, NamedSharding):
        return sharding
    if not isinstance(sharding, PartitionSpec):
        raise TypeError(
            f"{sharding=} must be a jax.sharding.NamedSharding, such as "
            "table.sharding, or a PartitionSpec of the mesh that jax.set_mesh has set"
        )
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"{sharding=} names axes, but no mesh is in scope: pass "
            "jax.sharding.NamedSharding(mesh, spec), or call this within jax.set_mesh"
        )
    return NamedSharding(mesh, sharding)


def everywhere(arrays: _Tree) -> _Tree:
    """The whole of arrays on every device, where their types tell that they are spread.

    A NumPy array stays what it is: JAX would narrow 64-bit ids, right or wrong.
    """
    leaves, tree = jax.tree.flatten(arrays)
    shardings = [explicit_sharding(x) for x in leaves]
    if any(sharding is not None for sharding in shardings):
        # In one program: of two, a CPU's devices may each wait in another one.
        places = tuple(
            None if old is None else NamedSharding(old.mesh, PartitionSpec())
            for old in shardings
        )
        moved = [x for x, place in zip(leaves, places, strict=True) if place]
        gathered = iter(_spread(moved, tuple(filter(None, places))))
        leaves = [
            next(gathered) if place else x
            for x, place in zip(leaves, places, strict=True)
        ]
    return jax.tree.unflatten(tree, leaves)


def like(ids: Any, rows: jax.Array) -> jax.Array:
    """Spreads what was looked up as the ids are, where their type tells."""
    sharding = explicit_sharding(ids)
    if sharding is None:
        return rows
    place = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))
    return _spread([rows], (place,))[0]


def explicit_sharding(x: Any) -> Any:
    """The sharding that the type of an array tells; None where it tells none."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if _is_explicit(sharding.mesh) else None


def _is_explicit(mesh: Any) -> bool:
    return not mesh.empty and mesh.are_all_axes_explicit


@functools.partial(jax.jit, static_argnames="places")
def _spread(
    arrays: list[jax.Array], places: tuple[NamedSharding, ...]
) -> list[jax.Array]:
    return [jax.reshard(x, place) for x, place in zip(arrays, places, strict=True)]


def vary_alike(arrays: _Tree, *others: Any) -> _Tree:
    """Casts arrays to vary over each axis of the mesh that any of them varies over.

    `others` count too, and are not cast. Outside of `shard_map` nothing is done. A
    kernel has one type for its results and knows no better than that of its tables. If
    ids vary and the tables do not, say, then the new tables do: JAX must be told, so
    that it can refuse to call them replicas.
    """
    axes = frozenset().union(*map(_axes, jax.tree.leaves((arrays, others))))

    def cast(x: Any) -> Any:
        missing = tuple(axes - _axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def _axes(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
