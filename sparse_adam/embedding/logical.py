"""Whole states by table: weights and slots, however they are stacked and stored.

The leaves of a state are arrays of stacks, and those of packed ones words that hold
several arrays, so that sums or casts of them mean nothing. A checkpoint of logical
arrays fits any stacking and any storage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sparse_adam._types import Storage
from sparse_adam.embedding.optimizer import PARAMETERS
from sparse_adam.embedding.placed import filled, layout_of, parts_of
from sparse_adam.embedding.stacks import Stack, Table
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.step import STEP, check_step, given_step, step_at
from sparse_adam.embedding.stored import (
    arrays_by_table,
    as_stored,
    checked,
    placed_as,
    stacked,
)
from sparse_adam.embedding.tables import EmbeddingLayout
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.shards import explicit_sharding, known_sharding
from sparse_adam.ops.spread import Spread


def to_logical(state: EmbeddingState) -> dict[str, dict[str, jax.Array]]:
    """Returns the weights and slots of each table: to compute with, and to checkpoint.

    Args:
        state: of any stacking and storage.

    Returns:
        By table name `parameters` and, for `Adam`, `momenta` and `velocities`: `[V, D]`
        each, a slot per row `[V]`. Those of plain tables that stand alone are the
        state's own arrays. A table whose updates depend on the step also
        has `step`, that of the state: an int32 scalar.

    Raises:
        TypeError: the state has arrays of a wrong dtype.
        ValueError: the state is not of its layout's shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> table = TableConfig(4, 4, jax.nn.initializers.ones, name="user")
        >>> state = init(FeatureConfig(table), Adam(), jax.random.key(0))
        >>> norms = jax.tree.map(jnp.linalg.norm, to_logical(state))
        >>> {name: float(x) for name, x in norms["user"].items()}
        {'momenta': 0.0, 'parameters': 4.0, 'velocities': 0.0}
    """
    found = {}
    stacks = checked(state.stacks, state.layout.stacks)
    for stored, stack in zip(stacks, state.layout.stacks, strict=True):
        by_table = arrays_by_table(stored, stack)
        for table, arrays in zip(stack.tables, by_table, strict=True):
            found[table.name] = dict(zip(table.array_names, arrays, strict=True))
    check_step(state.step, state.layout.by_step)
    for name in state.layout.by_step:
        found[name][STEP] = state.step
    return {table.name: found[table.name] for table in state.layout.tables}


def from_logical(
    like: EmbeddingState | EmbeddingLayout,
    arrays: Mapping[str, Mapping[str, ArrayLike]],
    *,
    storage: Storage | None = None,
) -> EmbeddingState:
    """Returns a state of these arrays, in the stacks and the storage of another one.

    Args:
        like: a state: then what `arrays` leaves out stays as it is there, and new
            arrays take the dtype and the sharding of the old. Or the layout of one:
            then `arrays` has all, and they take the dtypes of the configuration.
        arrays: by table name, and by the names of `to_logical`. They are copied. Where
            the state counts steps it takes `step` of any table that has it; where none
            has, as in a checkpoint from before the rate was a function of the step, it
            keeps its own, which of a layout is 0. Elsewhere a `step` is not used.
            A moving average that is left out begins as the weights, if those are given.
            Those of dtype `V2`, as NumPy's files return bfloat16, are taken for
            bfloat16.
        storage: "plain", "packed" or None as in `init`. Only with a layout.

    Raises:
        TypeError: a table that is no dict of arrays by name.
        ValueError: an unknown table or array, another shape, one that is missing,
            different steps, or a storage for a state that has its own.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = [FeatureConfig(TableConfig(4, 2, name=name)) for name in "ab"]
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> apart = init(config, Adam(), jax.random.key(1), stack=False)
        >>> apart = from_logical(apart, to_logical(state))
        >>> len(state.stacks), len(apart.stacks)
        (1, 2)
        >>> bool((apart.table("b") == state.table("b")).all())
        True
    """
    layout = like if isinstance(like, EmbeddingLayout) else like.layout
    _check_arrays(layout, arrays)
    if isinstance(like, EmbeddingLayout):
        return _new_state(like, arrays, storage)
    if storage is not None:
        raise ValueError(
            f"{storage=} must be None, since a state has its own: pass state.layout"
        )
    stacks = list(checked(like.stacks, layout.stacks))
    for number, stack in enumerate(layout.stacks):
        if any(arrays.get(table.name) for table in stack.tables):
            stored = stacks[number]
            packed = isinstance(stored, PackedTable)
            if stack.spread is not None:
                dtypes = layout_of(stack, stored).dtypes
                new = [
                    _parts(
                        table,
                        _with_ema(table, arrays.get(table.name, {})),
                        dtypes,
                        stack.spread,
                    )
                    for table in stack.tables
                ]
                stacks[number] = filled(stack, new, stored=stored, packed=packed)
                continue
            parts = [
                as_stored(stack, new, packed=packed)
                for new in _replaced(stored, stack, arrays)
            ]
            stacks[number] = placed_as(stored, stacked(stack, parts))
    return EmbeddingState(tuple(stacks), layout, _step(layout, arrays, like.step))


def map_arrays(
    function: Callable[..., ArrayLike], state: EmbeddingState, *others: EmbeddingState
) -> EmbeddingState:
    """Applies a function to the weights and to each slot of all tables.

    Args:
        function: of an array `[V, D]` (or `[V]` of a slot per row) and the same one of
            each of `others`, to one of this shape, float32 or bfloat16.
        state: of any storage.
        *others: states of the same layout, stored alike or not.

    Returns:
        A state that is stored as `state` is, and has its step.

    Raises:
        TypeError: a result is of another dtype, or a step is no int32 scalar.
        ValueError: a state is of another layout, or a result of another shape.

    Examples:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(4, 2, name="user"))
        >>> a, b = (init(config, Adam(), jax.random.key(i)) for i in (0, 1))
        >>> average = map_arrays(lambda x, y: (x + y) / 2, a, b)
        >>> average.table("user").shape
        (4, 2)
    """
    for number, other in enumerate(others):
        if other.layout != state.layout:
            raise ValueError(
                f"others[{number}].layout={other.layout} must be that of the state, "
                f"{state.layout}: make both from one feature_config, optimizer and "
                "stack"
            )
    layout = state.layout
    given = [checked(one.stacks, layout.stacks) for one in (state, *others)]
    stacks = []
    for stack, *own in zip(layout.stacks, *given, strict=True):
        packed = isinstance(own[0], PackedTable)
        parts = []
        by_table = zip(*(arrays_by_table(one, stack) for one in own), strict=True)
        for table, of_each_state in zip(stack.tables, by_table, strict=True):
            new = [function(*each) for each in zip(*of_each_state, strict=True)]
            parts.append(_checked_part(stack, table, new, packed=packed))
        if stack.spread is None:
            stacks.append(stacked(stack, parts))
        else:
            in_parts = [[parts_of(x, stack.spread) for x in part] for part in parts]
            stacks.append(filled(stack, in_parts, packed=packed))
    check_step(state.step, layout.by_step)
    return EmbeddingState(tuple(stacks), layout, state.step)


def _checked_part(
    stack: Stack, table: Table, new: Sequence[Any], *, packed: bool
) -> Any:
    """Returns the new arrays of one table, checked; packed only on one device."""
    part = as_stored(stack, new, packed=packed and stack.spread is None)
    checked((part,), (Stack((table,), (0,)),))
    return part


def _replaced(
    stored: Any, stack: Stack, arrays: Mapping[str, Mapping[str, ArrayLike]]
) -> Iterator[list[jax.Array]]:
    """Returns the arrays of each table, those that are given in place of its own."""
    array = jax.tree.leaves(stored)[0]
    spread = known_sharding(array) if explicit_sharding(array) is not None else None
    for table, old in zip(stack.tables, arrays_by_table(stored, stack), strict=True):
        given = _with_ema(table, arrays.get(table.name, {}))
        new = [
            # A copy: the next update donates it.
            jnp.array(_known(given.get(name, x)), dtype=x.dtype, copy=True)
            for name, x in zip(table.array_names, old, strict=True)
        ]
        if spread is not None and len(stack.tables) > 1:
            # What is given and what stays can be joined where each device has both.
            new = jax.device_put(new, NamedSharding(spread.mesh, PartitionSpec()))
        yield new


def _new_state(
    layout: EmbeddingLayout,
    arrays: Mapping[str, Mapping[str, ArrayLike]],
    storage: Storage | None,
) -> EmbeddingState:
    """Returns a state of arrays that are all given."""
    stacks = []
    for stack in layout.stacks:
        packed = stack.optimizer.storage(stack.dim, storage) == "packed"
        parts = []
        for table in stack.tables:
            given = _with_ema(table, arrays.get(table.name, {}))
            missing = [name for name in table.array_names if name not in given]
            if missing:
                raise ValueError(
                    f"arrays has no {missing} of table {table.name!r}; with a layout "
                    "it must have all arrays: pass a state to keep those of that one"
                )
            if stack.spread is None:
                new = _of_config(table, given)
                parts.append(as_stored(stack, new, packed=packed))
            else:
                parts.append(_parts(table, given, _dtypes(table), stack.spread))
        if stack.spread is None:
            stacks.append(stacked(stack, parts))
        else:
            stacks.append(filled(stack, parts, packed=packed))
    return EmbeddingState(tuple(stacks), layout, _step(layout, arrays, None))


def _step(
    layout: EmbeddingLayout, arrays: Mapping[str, Mapping[str, ArrayLike]], old: Any
) -> jax.Array | None:
    """Returns the step that the arrays have, or else the old one, or 0."""
    if not layout.by_step:
        return None
    check_step(old, [])
    steps = {name: own[STEP] for name, own in arrays.items() if STEP in own}
    given = given_step(steps)
    if given is None and old is not None:
        return old
    return step_at(0 if given is None else given, layout.stacks[0].spread)


def _with_ema(table: Table, given: Mapping[str, ArrayLike]) -> Mapping[str, ArrayLike]:
    """Returns given arrays with slots that begin as the weights, where those are."""
    if PARAMETERS not in given:
        return given
    slots = table.optimizer.rule.slots
    own = {s.name: given[PARAMETERS] for s in slots if s.initial == "weights"}
    return own | dict(given)


def _parts(
    table: Table,
    given: Mapping[str, ArrayLike],
    dtypes: Sequence[np.dtype],
    spread: Spread,
) -> list[jax.Array | None]:
    """Returns what is given of a table in parts, None for all else."""
    return [
        parts_of(_known(given[name]), spread, dtype) if name in given else None
        for name, dtype in zip(table.array_names, dtypes, strict=True)
    ]


def _of_config(table: Table, given: Mapping[str, ArrayLike]) -> list[jax.Array]:
    """Returns copies of a table's arrays in the dtypes of its configuration."""
    return [
        jnp.array(_known(given[name]), dtype=dtype, copy=True)
        for name, dtype in zip(table.array_names, _dtypes(table), strict=True)
    ]


def _dtypes(table: Table) -> list[np.dtype]:
    """Returns the dtypes of a table's arrays as its configuration says them."""
    dtypes = [np.dtype(table.config.dtype)]
    for slot in table.optimizer.rule.slots:
        per_row = slot.per == "row"
        dtypes.append(np.dtype(np.float32 if per_row else table.config.slot_dtype))
    return dtypes


def _known(array: ArrayLike) -> ArrayLike:
    """Returns an array as JAX knows it: NumPy's files forget the name of bfloat16."""
    if isinstance(array, np.ndarray) and array.dtype == np.dtype("V2"):
        return array.view(jnp.bfloat16)
    return array


def _check_arrays(
    layout: EmbeddingLayout, arrays: Mapping[str, Mapping[str, ArrayLike]]
) -> None:
    """Checks the names and shapes of logical arrays."""
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays is a {type(arrays).__name__}; it must be a dict of tables by "
            "name, as to_logical() and retrieve() return"
        )
    for name, given in arrays.items():
        if name not in layout.places:
            raise ValueError(
                f"arrays has the table {name!r}, not in {list(layout.places)}"
            )
        number, place = layout.place(name)
        table = layout.stacks[number].tables[place]
        expected = dict(zip(table.array_names, table.shapes, strict=True)) | {STEP: ()}
        if not isinstance(given, Mapping):
            raise TypeError(
                f"arrays has a {type(given).__name__} for table {name!r}; it must be a "
                f"dict of some of the arrays {table.array_names}: for the weights "
                f"alone pass {{{name!r}: {{'parameters': array}}}}"
            )
        for slot, array in given.items():
            if expected.get(slot) != np.shape(array):
                raise ValueError(
                    f"arrays has {slot!r} of shape {np.shape(array)} for table "
                    f"{name!r}; it must be one of {expected}"
                )
