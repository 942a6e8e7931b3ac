"""A table whose weights and slots stand together, in one array."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from sparse_adam.kernels.layout import MAX_DIM, PackedLayout
from sparse_adam.ops.lookup import lookup_packed
from sparse_adam.ops.packing import pack_rows, unpack_rows
from sparse_adam.ops.shards import Shards, vary_alike
from sparse_adam.ops.validate import STORED_DTYPES
from sparse_adam.rules import AdamRule, UpdateRule, initial_slots


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("lines",), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True, slots=True)
class PackedTable:
    """The weights of an embedding table and their slots, in one array.

    On a TPU all that an update of a row needs is then moved by one DMA in and one out,
    instead of three and three, and it works for every D: plain `[V, D]` arrays are
    stored there row by row only if D is a multiple of 128. A pytree of one int32
    array, which is no weight to differentiate by: differentiate by the rows that
    `lookup` returns. Nor is it one to compute with: `jax.tree.map` of an average, a
    cast or a norm sees words, so use `map` or `unpack`.

    Attributes:
        lines: int32 `layout.shape`, `[lines, 128]`.
        layout: where each row stands: V, D and the dtypes. Static.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from sparse_adam import packed_adam_update
        >>> ones = jax.nn.initializers.ones
        >>> table = PackedTable.init(jax.random.key(0), 1000, 16, ones)
        >>> ids = jnp.array([3, 999, -1])
        >>> table.lookup(ids).sum(axis=1).tolist()
        [16.0, 16.0, 0.0]
        >>> table = packed_adam_update(table, ids, jnp.ones((3, 16)), learning_rate=0.5)
        >>> weights, momenta, velocities = table.unpack()
        >>> print(weights[-2:, 0].round(4))
        [ 1.     -0.5811]
    """

    lines: jax.Array
    layout: PackedLayout

    @property
    def num_rows(self) -> int:
        """Returns V."""
        return self.layout.num_rows

    @property
    def dim(self) -> int:
        """Returns D."""
        return self.layout.dim

    @classmethod
    def pack(cls, table: ArrayLike, *slots: ArrayLike) -> "PackedTable":
        """Packs a table and its slots, `[V, D]` each, losing nothing.

        Args:
            table: `[V, D]` weights, float32 or bfloat16.
            *slots: the slots of the update rule in its order, alike: for Adam the
                momenta and the velocities.

        Raises:
            ValueError: the shapes differ, or D is above 4096.
            TypeError: an array is of another dtype.
        """
        arrays = tuple(map(jnp.asarray, (table, *slots)))
        layout = _layout_of(arrays)
        shards = Shards.of("table", arrays[0])
        lines = pack_rows(vary_alike(arrays), layout=layout, shards=shards)
        return cls(lines, layout)

    @classmethod
    def init(
        cls,
        key: jax.Array,
        num_rows: int,
        dim: int,
        initializer: Callable[..., jax.Array],
        *,
        rule: UpdateRule | None = None,
        dtype: DTypeLike = jnp.float32,
        slot_dtype: DTypeLike = jnp.float32,
    ) -> "PackedTable":
        """Draws the weights, `initializer(key, (V, D), dtype)`, and makes new slots.

        Args:
            key: of `jax.random`.
            num_rows: V.
            dim: D, 1 to 4096.
            initializer: as those of `jax.nn.initializers`.
            rule: whose slots to make; None is Adam's.
            dtype: of the weights.
            slot_dtype: of the slots.

        Raises:
            ValueError: D is above 4096, or the rule has a slot that is per row.
        """
        rule = AdamRule() if rule is None else rule
        _check_slots(rule)
        shape = (num_rows, dim)

        def make(key: jax.Array) -> "PackedTable":
            weights = initializer(key, shape, dtype)
            return cls.pack(weights, *initial_slots(rule, shape, slot_dtype, weights))

        return jax.jit(make)(key)

    def unpack(self) -> tuple[jax.Array, ...]:
        """Returns the table and its slots, `[V, D]` each.

        Raises:
            TypeError: the lines are not int32, as `jax.tree.map` may leave them.
            ValueError: the lines are not of the layout's shape.
        """
        check_lines(self)
        shards = Shards.of("lines", self.lines)
        return unpack_rows(self.lines, layout=self.layout, shards=shards)

    def map(
        self, function: Callable[..., ArrayLike], *others: "PackedTable"
    ) -> "PackedTable":
        """Applies a function to the table and to each of its slots.

        It is `jax.tree.map` of the arrays that `unpack` returns: an average of two
        tables, a moving average, a cast. On the way there are all these arrays.

        Args:
            function: of an array `[V, D]` and the same one of each of `others`, in
                their own dtypes, to one of this shape, float32 or bfloat16.
            *others: tables of as many arrays of this shape.

        Raises:
            TypeError: one of `others` is no packed table; a result is of another dtype.
            ValueError: they have another shape or another number of arrays.

        Examples:
            >>> import jax.numpy as jnp
            >>> ones, zeros = jnp.ones((2, 4)), jnp.zeros((2, 4))
            >>> a, b = PackedTable.pack(ones, zeros), PackedTable.pack(3 * ones, ones)
            >>> average = a.map(lambda x, y: (x + y) / 2, b)
            >>> [float(x.mean()) for x in average.unpack()]
            [2.0, 0.5]
            >>> average.map(lambda x: x.astype(jnp.bfloat16)).unpack()[0].dtype
            dtype(bfloat16)
        """
        mine = (self.num_rows, self.dim, len(self.layout.dtypes))
        for number, other in enumerate(others):
            if not isinstance(other, PackedTable):
                raise TypeError(
                    f"others[{number}] is {type(other).__name__}; it must be a "
                    "PackedTable"
                )
            theirs = (other.num_rows, other.dim, len(other.layout.dtypes))
            if theirs != mine:
                raise ValueError(
                    f"others[{number}] has (V, D, number of arrays)={theirs}; it must "
                    f"have {mine}, as the table"
                )
        arrays = zip(self.unpack(), *(x.unpack() for x in others), strict=True)
        return PackedTable.pack(*(function(*own) for own in arrays))

    def lookup(
        self,
        ids: ArrayLike,
        *,
        sharding: NamedSharding | PartitionSpec | None = None,
    ) -> jax.Array:
        """Returns the weights of rows: `ids.shape + (D,)`, in the table's dtype.

        An id outside `[0, V)` gives zeros. `sharding` is as of `sparse_adam.lookup`.

        Raises:
            TypeError: `ids` are not integers, or the lines are not int32.
            ValueError: the lines are not of the layout's shape.
        """
        check_lines(self)
        return lookup_packed(self.lines, ids, self.layout, sharding)


def packed_layout(packed: PackedTable, rule: UpdateRule) -> PackedLayout:
    """Returns the layout of a packed table, checked against the rule that updates it.

    Raises:
        TypeError: the lines are not int32.
        ValueError: the table holds another number of arrays than the rule has, the
            rule has a slot that is per row, or the lines are not of the layout's shape.
    """
    check_lines(packed)
    _check_slots(rule)
    names = ("table", *(slot.name for slot in rule.slots))
    if len(names) != len(packed.layout.dtypes):
        raise ValueError(
            f"the packed table holds {len(packed.layout.dtypes)} arrays, but "
            f"{type(rule).__name__} has {len(names)}, {names}: pass "
            "PackedTable.pack(table, *initial_slots(rule, table.shape, jnp.float32))"
        )
    return packed.layout


def check_lines(packed: PackedTable) -> None:
    """Refuses lines that are not words of the layout's shape.

    Raises:
        TypeError: they are not int32.
        ValueError: they are of another shape.
    """
    if packed.lines.dtype != np.int32:
        raise TypeError(
            f"packed.lines.dtype={packed.lines.dtype} must be int32: lines are words "
            "that hold several arrays, not numbers to compute with, as jax.tree.map "
            "does. Call packed.map(function) for weights and slots, or unpack() them"
        )
    if packed.lines.shape != packed.layout.shape:
        raise ValueError(
            f"packed.lines.shape={packed.lines.shape} must be {packed.layout.shape}, "
            "as its layout says: make it by PackedTable.pack; inside jax.shard_map, "
            "where a device has its own lines only, by PackedTable(lines, "
            "layout.divided(the number of devices))"
        )


def _check_slots(rule: UpdateRule) -> None:
    per_row = [slot.name for slot in rule.slots if slot.per == "row"]
    if per_row:
        raise ValueError(
            f"{rule!r} has the slots {per_row} of one number for each row, for which a "
            "packed table has no place: keep plain arrays (storage='plain')"
        )


def _layout_of(arrays: Sequence[jax.Array]) -> PackedLayout:
    names = ("table", *(f"slots[{i}]" for i in range(len(arrays) - 1)))
    shape = arrays[0].shape
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 2 or 0 in array.shape or array.shape != shape:
            raise ValueError(
                f"{name}.shape={array.shape} must be (V, D), both at least 1, and the "
                f"same for the table and its slots; table.shape={shape}. A slot of one "
                "number for each row has no place in a packed table: keep plain arrays"
            )
        if array.dtype not in STORED_DTYPES:
            raise TypeError(
                f"{name}.dtype={array.dtype} must be float32 or bfloat16: pass "
                f"{name}.astype(jnp.float32)"
            )
    if shape[1] > MAX_DIM:
        raise ValueError(
            f"table.shape={shape}: D must be at most {MAX_DIM} to be packed; split the "
            "table by columns, or keep plain arrays"
        )
    num_rows, dim = shape
    return PackedLayout(num_rows, dim, tuple(array.dtype for array in arrays))
