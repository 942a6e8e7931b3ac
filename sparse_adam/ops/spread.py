"""Tables and batches that are spread over the devices of a mesh.

`Spread` says over which devices, and how their rows stand there. It maps functions to
these devices by itself, so it works under `jax.jit` whether the axes of the mesh are
automatic, explicit or mixed; inside a `jax.shard_map` over its axes, each device calls
such a function with what it has.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam.kernels.layout import SUBLANES, Layout, PackedLayout
from sparse_adam.ops import placing
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.shards import is_inside


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """The devices that share the rows of tables and the samples of a batch.

    A table of V rows becomes an array of n equal parts, one for each device, that end
    in rows which no id names: V need not divide by n. Along the axes of the mesh that
    are not named, devices have copies of the rows and must get the same samples.

    Attributes:
        mesh: a `jax.sharding.Mesh`, with axes of any type.
        axes: the names of the axes over which rows and samples are spread.
        interleaved: row r is on device r mod n, which suits ids that are sorted by
            frequency; False keeps ranges of rows together.

    Raises:
        TypeError: `axes` is no tuple of names.
        ValueError: the mesh has no such axis, or there is none.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import Mesh
        >>> spread = Spread(Mesh(jax.devices()[:1], "x"), ("x",))
        >>> spread.logical(spread.place(jnp.arange(3.0)), num_rows=3).tolist()
        [0.0, 1.0, 2.0]
    """

    mesh: Any
    axes: tuple[str, ...]
    interleaved: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.axes, tuple):
            raise TypeError(f"axes={self.axes!r} must be a tuple of names of mesh axes")
        names = self.mesh.axis_names
        unknown = [axis for axis in self.axes if axis not in names]
        if unknown or not self.axes or len(set(self.axes)) < len(self.axes):
            raise ValueError(
                f"axes={self.axes} must be one or more of the mesh's axes {names}, "
                "each once"
            )

    @property
    def count(self) -> int:
        """Returns n, into how many parts rows and samples are cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def spec(self) -> PartitionSpec:
        """Returns how the first dimension of each array is spread."""
        return PartitionSpec(self.axes)

    @property
    def sharding(self) -> NamedSharding:
        """Returns how the rows of a table are spread."""
        return NamedSharding(self.mesh, self.spec)

    @property
    def is_inside(self) -> bool:
        """Returns whether this is traced in a `jax.shard_map` over these axes.

        Raises:
            ValueError: it is in one over some of the axes only.
        """
        return is_inside(self.axes)

    def placement(self, num_rows: int) -> Placement:
        """Returns where each of V rows is."""
        return Placement(num_rows, self.count, self.interleaved)

    def part_rows(self, num_rows: int, dim: int) -> int:
        """Returns how many rows each device stores of a table of V rows.

        They fill whole tiles of a TPU in either storage, so the last ones may be rows
        that no id names.
        """
        tile = SUBLANES * PackedLayout(1, dim).rows_per_group
        return tile * -(-num_rows // (self.count * tile))

    def part(self, layout: Layout) -> Layout:
        """Returns the layout of what one device has of a table of the given layout."""
        return layout.with_rows(self.part_rows(layout.num_rows, layout.dim))

    def whole(self, layout: Layout) -> Layout:
        """Returns the layout of the parts of all devices, one behind the other."""
        return layout.with_rows(self.count * self.part(layout).num_rows)

    def map(
        self, function: Callable[..., Any], operands: Any, results: Any
    ) -> Callable[..., Any]:
        """Returns the function on each device, of its parts of the arguments.

        Args:
            function: of arrays as one device has them.
            operands: a tree of `PartitionSpec`s for each argument.
            results: a tree of `PartitionSpec`s for what it returns.
        """
        if self.is_inside:
            return function
        mesh = self._mesh()
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=operands,
            out_specs=results,
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            # JAX's interpreter of kernels does not know which values vary.
            check_vma=False,
        )

        def call(*arguments: Any) -> Any:
            return mapped(*_alike(mesh, operands, arguments))

        return call

    def _mesh(self) -> Any:
        """Returns the mesh in scope, or else the own one as an abstract mesh.

        Raises:
            ValueError: another mesh is in scope.
        """
        scope = jax.sharding.get_abstract_mesh()
        if scope.empty:
            return self.mesh
        if dict(scope.shape) != dict(self.mesh.shape):
            raise ValueError(
                f"the mesh in scope is {scope}, but the tables are spread over "
                f"{self.mesh}: call this within jax.set_mesh of the latter, or of none"
            )
        return scope

    def place(self, rows: jax.Array, size: int | None = None) -> jax.Array:
        """Spreads an array in logical order, `[V, ...]`, over the devices.

        No device ever has all of it.

        Args:
            rows: the array.
            size: rows of a device's part, as of `part_rows`; None is the least.

        Returns:
            `[n * size, ...]`, spread; zeros where no row is.
        """
        size = _least(self, rows.shape[0]) if size is None else size
        return _place(rows, spread=self, size=size)

    def logical(self, stored: jax.Array, num_rows: int) -> jax.Array:
        """Returns in logical order, `[V, ...]`, what `place` has spread."""
        return _logical(stored, spread=self, num_rows=num_rows)

    def cut(self, rows: jax.Array, size: int) -> jax.Array:
        """Returns the first rows of a spread array: whole where they do not divide."""
        if rows.shape[0] == size:
            return rows
        return everywhere(rows)[:size]


@functools.partial(jax.jit, static_argnames=("spread", "size"))
def _place(rows: jax.Array, *, spread: Spread, size: int) -> jax.Array:
    num_rows = rows.shape[0]

    def place_own(part: jax.Array) -> jax.Array:
        if not spread.interleaved:
            return _fit(part, size)
        own = jnp.zeros((size, *part.shape[1:]), part.dtype)
        return placing.write(own, part, spread.axes, 0, num_rows)

    parts = _fit(rows, spread.count * _least(spread, num_rows))
    return spread.map(place_own, (spread.spec,), spread.spec)(parts)


@functools.partial(jax.jit, static_argnames=("spread", "num_rows"))
def _logical(stored: jax.Array, *, spread: Spread, num_rows: int) -> jax.Array:
    def collect(own: jax.Array) -> jax.Array:
        if not spread.interleaved:
            return _fit(own, _least(spread, num_rows))
        return placing.read(own, spread.axes, 0, num_rows)

    ordered = spread.map(collect, (spread.spec,), spread.spec)(stored)
    return spread.cut(ordered, num_rows)


def _least(spread: Spread, num_rows: int) -> int:
    """Returns the rows of a part of V rows."""
    return -(-num_rows // spread.count)


def everywhere(x: jax.Array) -> jax.Array:
    """Returns all of an array on each device, where its type tells how it is spread."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _fit(rows: jax.Array, size: int) -> jax.Array:
    """Cuts an array to so many rows, or fills it with zeros."""
    missing = max(size - rows.shape[0], 0)
    return jnp.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)))[:size]


def _alike(mesh: Any, specs: Any, arrays: Any) -> Any:
    """Spreads arrays as specs say along explicit axes, where JAX would not do it."""
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        return arrays

    def spread(spec: PartitionSpec, tree: Any) -> Any:
        named = [
            tuple(axis for axis in _names(part) if axis in explicit) or None
            for part in spec
        ]
        place = NamedSharding(mesh, PartitionSpec(*named))
        return jax.tree.map(lambda x: jax.reshard(x, place), tree)

    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(spread, specs, arrays, is_leaf=is_spec)


def _names(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)
