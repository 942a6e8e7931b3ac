"""A table whose weights and slots lie together, and the update of its rows."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from sparse_adam.kernels.layout import MAX_DIM, NO_NOISE, PackedLayout
from sparse_adam.kernels.problem import State
from sparse_adam.ops import storage, validate
from sparse_adam.ops.dispatch import Config
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.lookup import lookup_rows
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.run import Occurrences, make_step, update_rows
from sparse_adam.ops.shards import Shards, vary_alike

_BLOCK_WORDS = 2**20  # of a table, packed or unpacked at a time


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("lines",), meta_fields=("layout",)
)
@dataclasses.dataclass(frozen=True, slots=True)
class PackedTable:
    """Weights, first and second moments of an embedding table, in one array.

    On a TPU all that an update of a row needs is then moved by one DMA in and one out,
    instead of three and three, and it works for every D: plain `[V, D]` arrays are
    stored there row by row only if D is a multiple of 128. A pytree of one int32
    array, which is no weight to differentiate by: differentiate by the rows that
    `lookup` returns.

    Attributes:
        lines: int32 `layout.shape`, `[lines, 128]`.
        layout: where each row stands: V, D and the three dtypes. Static.

    Example:
        >>> import jax, jax.numpy as jnp
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
        """V."""
        return self.layout.num_rows

    @property
    def dim(self) -> int:
        """D."""
        return self.layout.dim

    @classmethod
    def pack(
        cls, table: ArrayLike, momenta: ArrayLike, velocities: ArrayLike
    ) -> "PackedTable":
        """Packs three arrays `[V, D]`, float32 or bfloat16 each, losing nothing.

        Raises:
            ValueError: the shapes differ, or D is above 4096.
            TypeError: an array is of another dtype.
        """
        arrays = (table, momenta, velocities)
        layout = _layout_of(*arrays)
        table, momenta, velocities = vary_alike(tuple(map(jnp.asarray, arrays)))
        return cls(
            _pack_shards(
                *(table, momenta, velocities),
                layout=layout,
                shards=Shards.of("table", table),
            ),
            layout,
        )

    @classmethod
    def init(
        cls,
        key: jax.Array,
        num_rows: int,
        dim: int,
        initializer: Callable[..., jax.Array],
        *,
        dtype: DTypeLike = jnp.float32,
        slot_dtype: DTypeLike = jnp.float32,
    ) -> "PackedTable":
        """Draws the weights, `initializer(key, (V, D), dtype)`; the slots are zero."""
        shape = (num_rows, dim)

        def make(key: jax.Array) -> "PackedTable":
            zeros = jnp.zeros(shape, slot_dtype)
            return cls.pack(initializer(key, shape, dtype), zeros, zeros)

        return jax.jit(make)(key)

    def unpack(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns `table, momenta, velocities`, `[V, D]` each."""
        shards = Shards.of("lines", self.lines)
        return _unpack_shards(self.lines, layout=self.layout, shards=shards)

    def lookup(self, ids: ArrayLike) -> jax.Array:
        """Returns the weights of rows: `ids.shape + (D,)`, in the table's dtype.

        An id outside `[0, V)` gives zeros.

        Raises:
            TypeError: `ids` are not integers.
            ValueError: the lines are not of the layout's shape.
        """
        logical_shapes(self)
        return lookup_rows(self.lines, ids, self.layout)


def packed_adam_update(
    packed: PackedTable,
    ids: ArrayLike,
    grads: ArrayLike,
    *,
    learning_rate: ArrayLike = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    lazy_adam: bool = True,
    sum_inside_sqrt: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: float | None = None,
    clip_weight_max: float | None = None,
    weight_decay_factor: float | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: float | tuple[float | None, float | None] | None = None,
    sample_ids: ArrayLike | None = None,
    gains: ArrayLike | None = None,
    plan: UpdatePlan | None = None,
    rounding: str = "nearest",
    key: jax.Array | None = None,
    implementation: str | None = None,
    config: Config | None = None,
) -> PackedTable:
    """Updates the rows of a packed table that a batch looked up, with Adam.

    The same as `sparse_adam_update` in every respect but the storage; see there for
    the maths, the arguments and the errors. Donate the table
    (``jax.jit(..., donate_argnums=0)``) and it is updated in place.

    Example:
        >>> import jax.numpy as jnp
        >>> table = PackedTable.pack(*[jnp.zeros((4, 2))] * 3)
        >>> ids, grads = jnp.array([1, 1]), jnp.ones((2, 2))
        >>> table = packed_adam_update(table, ids, grads, learning_rate=0.1)
        >>> print((table.unpack()[1] > 0).any(axis=1))
        [False  True False False]
    """
    table, momenta, velocities = logical_shapes(packed)
    problem = validate.problem(
        packed=True,
        table=table,
        momenta=momenta,
        velocities=velocities,
        ids=ids,
        grads=grads,
        beta_1=beta_1,
        beta_2=beta_2,
        epsilon=epsilon,
        lazy_adam=lazy_adam,
        sum_inside_sqrt=sum_inside_sqrt,
        use_gradient_accumulation=use_gradient_accumulation,
        clip_weight_min=clip_weight_min,
        clip_weight_max=clip_weight_max,
        weight_decay_factor=weight_decay_factor,
        multiply_weight_decay_factor_by_learning_rate=(
            multiply_weight_decay_factor_by_learning_rate
        ),
        clipvalue=clipvalue,
        sample_ids=sample_ids,
        gains=gains,
        plan=plan,
        rounding=rounding,
        key=key,
    )
    occurrences = Occurrences(ids, grads, sample_ids, gains, plan)
    step = make_step(learning_rate, key, problem)
    (lines,) = update_rows(
        (packed.lines,), occurrences, step, problem, implementation, config
    )
    return PackedTable(lines, packed.layout)


def logical_shapes(packed: PackedTable) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays that a packed table holds, as `unpack` would return them.

    Raises:
        ValueError: the lines are not of the layout's shape.
    """
    layout = packed.layout
    if packed.lines.shape != layout.shape:
        raise ValueError(
            f"packed.lines.shape={packed.lines.shape} must be {layout.shape}, as its "
            "layout says: make it by PackedTable.pack"
        )
    shape = (layout.num_rows, layout.dim)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype in layout.dtypes)


def _layout_of(
    table: ArrayLike, momenta: ArrayLike, velocities: ArrayLike
) -> PackedLayout:
    shape, dtypes = validate.stored(table, momenta, velocities)
    if shape[1] > MAX_DIM:
        raise ValueError(
            f"table.shape={shape}: D must be at most {MAX_DIM} to be packed; split the "
            "table by columns, or keep three plain arrays"
        )
    return PackedLayout(*shape, *dtypes)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "shards"))
def _pack_shards(
    table: jax.Array,
    momenta: jax.Array,
    velocities: jax.Array,
    *,
    layout: PackedLayout,
    shards: Shards | None,
) -> jax.Array:
    arrays = (table, momenta, velocities)
    if shards is None:
        return _pack(*arrays, layout=layout)
    own = shards.own_layout(layout)
    return shards.on_each(lambda arrays: _pack(*arrays, layout=own), arrays)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "shards"))
def _unpack_shards(
    lines: jax.Array, *, layout: PackedLayout, shards: Shards | None
) -> State:
    if shards is None:
        return _unpack(lines, layout=layout)
    own = shards.own_layout(layout)
    return shards.on_each(lambda lines: _unpack(lines, layout=own), lines)


def _pack(
    table: jax.Array, momenta: jax.Array, velocities: jax.Array, *, layout: PackedLayout
) -> jax.Array:
    plain, packed, size = _storages(layout)
    arrays = plain.opened((table, momenta, velocities))

    def pack(start: jax.Array, rows: int, lines: State) -> State:
        missing = -rows % packed.step
        w, m, v = (
            jnp.pad(x, ((0, missing), (0, 0))) for x in plain.slice(arrays, start, rows)
        )
        return packed.update_slice(lines, start, (w, m, v), NO_NOISE)

    lines = vary_alike(jnp.zeros(layout.shape, jnp.int32), table)
    return _in_blocks(pack, layout.num_rows, size, (lines,))[0]


def _unpack(lines: jax.Array, *, layout: PackedLayout) -> State:
    plain, packed, size = _storages(layout)
    shape = (layout.num_rows, layout.dim)
    zeros = tuple(jnp.zeros(shape, dtype) for dtype in layout.dtypes)
    arrays = plain.opened(vary_alike(zeros, lines))

    def unpack(start: jax.Array, rows: int, arrays: State) -> State:
        missing = -rows % packed.step
        w, m, v = (x[:rows] for x in packed.slice((lines,), start, rows + missing))
        return plain.update_slice(arrays, start, (w, m, v), NO_NOISE)

    return plain.closed(_in_blocks(unpack, layout.num_rows, size, arrays))


def _storages(layout: PackedLayout) -> tuple[storage.Plain, storage.Packed, int]:
    """Both, and how many rows to move at a time."""
    packed = storage.Packed(layout)
    rows = max(1, _BLOCK_WORDS // layout.dim // packed.step) * packed.step
    return storage.Plain(layout.num_rows, layout.dtypes), packed, rows


def _in_blocks(
    body: Callable[[jax.Array, int, State], State], rows: int, size: int, state: State
) -> State:
    """Calls `state = body(start, size, state)` for all rows, the last ones apart.

    In one piece XLA would make every plane of the whole table on the way.
    """
    blocks = rows // size
    if blocks:
        state = lax.fori_loop(
            0, blocks, lambda i, state: body(i * size, size, state), state
        )
    done = blocks * size
    return state if done == rows else body(jnp.int32(done), rows - done, state)
