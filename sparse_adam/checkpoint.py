"""Checkpoints of embedding tables by Orbax, which fit any storage and any devices.

`SaveTables` and `RestoreTables` are arguments of `orbax.checkpoint.CheckpointManager`,
as those of `orbax.checkpoint.args` are, for the item that holds an `EmbeddingState`.
The manager writes in the background, makes each checkpoint whole or not at all, and
keeps the last ones; `docs/checkpoints.md` shows a whole training loop.

A checkpoint holds tables by name, in logical order: `{"user": {"parameters": ...,
"momenta": ..., "velocities": ...}}`. How they were stored, stacked and spread over
devices is not in it.
"""

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_adam.embedding import EmbeddingState
from sparse_adam.embedding.optimizer import PARAMETERS
from sparse_adam.embedding.saved import (
    checksums,
    from_saved,
    grown,
    new_arrays,
    on_device,
    targets,
    to_saved,
)
from sparse_adam.embedding.stacks import Table
from sparse_adam.embedding.step import STEP

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "sparse_adam.checkpoint needs Orbax: pip install sparse_adam[checkpoint]"
    ) from error


class CheckpointMismatchError(ValueError):
    """A whole checkpoint does not fit the state that it is to be restored into."""


class CorruptCheckpointError(ValueError):
    """A checkpoint cannot be read, or has other numbers than were saved."""


class TablesHandler(ocp.AsyncCheckpointHandler):
    """Reads and writes the item of `SaveTables` and `RestoreTables`."""

    def __init__(self) -> None:
        self._arrays = ocp.PyTreeCheckpointHandler()

    async def async_save(self, directory: Any, args: "SaveTables") -> Any:
        """Begins to write; returns when the state may be donated.

        Orbax has then copied what is on a device. What is in a CPU's memory it shares,
        and JAX gives no memory away that is shared: there the next update copies.
        """
        return await self._arrays.async_save(directory, args=_array_args(args))

    def save(self, directory: Any, args: "SaveTables") -> None:
        """Writes to the end."""
        self._arrays.save(directory, args=_array_args(args))

    def metadata(self, directory: Any) -> Any:
        """Returns the shapes and dtypes of the arrays, by table."""
        return self._arrays.metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Ends the writing of all processes."""
        self._arrays.finalize(directory)

    def close(self) -> None:
        """Frees what the handler has."""
        self._arrays.close()

    def restore(self, directory: Any, args: "RestoreTables") -> EmbeddingState:
        """Returns the state that `args` describes."""
        try:
            metadata = self.metadata(directory)
            saved = {
                name: {slot: own for slot, own in arrays.items() if slot != STEP}
                for name, arrays in metadata.tree.items()
            }
            about: Any = metadata.custom_metadata or {}
            step = about[STEP] if STEP in about else self._step(directory, metadata)
            rows = {
                name: next(iter(arrays.values())).shape[0]
                for name, arrays in saved.items()
            } | about.get("num_rows", {})
        except Exception as error:  # whatever Orbax meets in a broken file
            raise _unreadable(directory) from error
        wanted = targets(args.like)
        _check_fit(args, saved, rows, step)
        arrays = self._read(directory, saved, wanted, about.get("checksums", {}))
        return from_saved(args.like, _completed(args, arrays, rows, wanted), step or 0)

    def _step(self, directory: Any, metadata: Any) -> int | None:
        """Returns the step of a checkpoint of what `to_logical` returns; None is none.

        `SaveTables` writes it beside the arrays; there it is one of them.
        """
        names = [name for name, arrays in metadata.tree.items() if STEP in arrays]
        if not names:
            return None
        like = {names[0]: {STEP: jax.ShapeDtypeStruct((), np.int32)}}
        how = jax.tree.map(_restore_args, like)
        args = ocp.args.PyTreeRestore(like, restore_args=how, partial_restore=True)
        return int(self._arrays.restore(directory, args=args)[names[0]][STEP])

    def _read(
        self,
        directory: Any,
        saved: Mapping[str, Mapping[str, Any]],
        wanted: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
        sums: Mapping[str, Mapping[str, int]],
    ) -> dict[str, dict[str, jax.Array]]:
        """Returns what is wanted and saved, in the shapes and the places wanted."""
        found = {
            name: {slot: like for slot, like in own.items() if slot in saved[name]}
            for name, own in wanted.items()
            if name in saved
        }
        how = jax.tree.map(_restore_args, found)
        try:
            read = self._arrays.restore(
                directory,
                args=ocp.args.PyTreeRestore(
                    found, restore_args=how, partial_restore=True
                ),
            )
        except Exception as error:
            raise _unreadable(directory) from error
        for name, own in checksums(read).items():
            for slot, value in own.items():
                if sums.get(name, {}).get(slot, value) != value:
                    raise CorruptCheckpointError(
                        f"the checkpoint in {directory} has other {slot} of table "
                        f"{name!r} than were saved: restore one before, as "
                        "restore_latest does"
                    )
        return jax.tree.map(on_device, read, found)


@ocp.args.register_with_handler(TablesHandler, for_save=True)
@dataclasses.dataclass
class SaveTables(ocp.args.CheckpointArgs):
    """Saves the tables and slots of a state, as an item of a checkpoint.

    When `manager.save` returns, the next update may donate the state, while files are
    still being written. Tables that are packed, stacked or spread need room on the
    device for another copy of themselves until then.

    Args:
        state: of any stacking and storage, on one device or spread.

    Examples:
        >>> import tempfile
        >>> import jax
        >>> import orbax.checkpoint as ocp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> features = FeatureConfig(TableConfig(5, 4, name="user"))
        >>> state = init(features, Adam(), jax.random.key(0))
        >>> packed = init(features, Adam(), jax.random.key(1), storage="packed")
        >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     saving = manager.save(7, args=SaveTables(state))
        ...     packed = manager.restore(7, args=RestoreTables(packed))
        >>> bool((packed.table("user") == state.table("user")).all())
        True
    """

    state: EmbeddingState


@ocp.args.register_with_handler(TablesHandler, for_restore=True)
@dataclasses.dataclass
class RestoreTables(ocp.args.CheckpointArgs):
    """Restores tables and slots: into another storage, stacking or set of devices.

    Args:
        like: what the restored state is to be like: a state, or its shapes,
            `jax.eval_shape(init, ...)`, of which no memory is needed. Its numbers are
            not used. Numbers are converted to its dtypes.
        key: of `jax.random`: makes what the checkpoint lacks: new tables, the rows of
            a table beyond those that were saved, and new slots. All are what `init`
            makes of this key. None refuses a checkpoint that lacks something.
        drop: names of what the checkpoint has and `like` has not: of tables, as
            `"user"`, or of slots, as `"user/momenta"`. All else that `like` has not is
            refused, but for the slots of frozen tables.

    Raises:
        CheckpointMismatchError: the checkpoint lacks something, or has something else.
        CorruptCheckpointError: it cannot be read, or was changed after it was saved.

    Example: see `SaveTables`.
    """

    like: EmbeddingState
    key: jax.Array | None = None
    drop: Collection[str] = ()


class Latest(NamedTuple):
    """What `restore_latest` found.

    Attributes:
        step: of the checkpoint.
        items: what the manager restored.
        unreadable: later steps, whose checkpoints cannot be read. A manager saves no
            step before them until they are deleted: `manager.delete(step)`.
    """

    step: int
    items: Any
    unreadable: tuple[int, ...]


def restore_latest(
    manager: ocp.CheckpointManager, args: ocp.args.CheckpointArgs
) -> Latest | None:
    """Restores the last checkpoint that can be read.

    Args:
        manager: of Orbax.
        args: `RestoreTables`, or a `Composite` with one, as of `manager.restore`.

    Returns:
        The checkpoint, or None where the manager has none at all. For each one that
        was passed over there is a warning.

    Raises:
        CheckpointMismatchError: see `RestoreTables`. Those before would not fit
            either.
        CorruptCheckpointError: there are checkpoints, and none can be read.

    Examples:
        >>> import tempfile
        >>> import jax
        >>> import orbax.checkpoint as ocp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> features = FeatureConfig(TableConfig(5, 4, name="user"))
        >>> state = init(features, Adam(), jax.random.key(0))
        >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     print(restore_latest(manager, RestoreTables(state)))
        ...     saving = manager.save(7, args=SaveTables(state))
        ...     restore_latest(manager, RestoreTables(state)).step
        None
        7
    """
    manager.wait_until_finished()
    unreadable: list[int] = []
    first_error = None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            items = manager.restore(step, args=args)
        except CheckpointMismatchError:
            raise
        except Exception as error:  # of Orbax, or of any handler of an item
            first_error = first_error or error
            unreadable.append(step)
            warnings.warn(
                f"the checkpoint of step {step} in {manager.directory} cannot be "
                f"restored, so that of the step before is taken: {error}",
                stacklevel=2,
            )
        else:
            return Latest(step, items, tuple(unreadable))
    if first_error is None:
        return None
    raise CorruptCheckpointError(
        f"none of the checkpoints of the steps {unreadable} in {manager.directory} can "
        f"be restored; the last one: {first_error}"
    ) from first_error


def _array_args(args: SaveTables) -> ocp.args.PyTreeSave:
    """Asks to write the arrays, and beside them how many rows count, and their sums."""
    arrays = to_saved(args.state)
    about = {
        "num_rows": {table.name: table.num_rows for table in args.state.layout.tables},
        "checksums": checksums(arrays),
    }
    if args.state.step is not None:
        about[STEP] = int(args.state.step)
    return ocp.args.PyTreeSave(arrays, custom_metadata=about)


def _restore_args(like: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    """Asks for an array in its own dtype, with as many rows as there are to be."""
    if like.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        sharding=like.sharding, global_shape=like.shape, strict=False
    )


def _check_fit(
    args: RestoreTables,
    saved: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, int],
    step: int | None,
) -> None:
    """Checks that nothing is lost and nothing lacks, other than was asked for."""
    if args.like.layout.by_step and step is None:
        _check_key(args, f"the step, which tables {args.like.layout.by_step} depend on")
    tables = {table.name: table for table in args.like.layout.tables}
    for name in saved:
        if name not in tables and name not in args.drop:
            raise CheckpointMismatchError(
                f"the checkpoint has the table {name!r}, which is none of "
                f"{list(tables)}: pass drop=[{name!r}] to leave it out"
            )
    for name, table in tables.items():
        if name not in saved:
            _check_key(args, f"table {name!r}, but has {list(saved)}")
        else:
            _check_arrays(args, table, saved[name], rows[name])


def _check_arrays(
    args: RestoreTables, table: Table, saved: Mapping[str, Any], num_rows: int
) -> None:
    name = table.name
    for slot, array in saved.items():
        where = f"{name}/{slot}"
        if slot not in table.array_names:
            if table.trainable and where not in args.drop:
                raise CheckpointMismatchError(
                    f"the checkpoint has {slot!r} of table {name!r}, but its optimizer "
                    f"has {list(table.array_names)}: pass drop=[{where!r}] to leave it "
                    "out"
                )
            continue
        shape = table.shapes[table.array_names.index(slot)]
        if array.shape[1:] != shape[1:]:
            raise CheckpointMismatchError(
                f"the checkpoint has {slot!r} of table {name!r} with rows of the shape "
                f"{array.shape[1:]}; they must be {shape[1:]}: only the number of rows "
                "may change"
            )
    for slot in table.array_names:
        if slot not in saved:
            _check_key(args, f"{slot!r} of table {name!r}, but has {list(saved)}")
    if num_rows > table.num_rows:
        raise CheckpointMismatchError(
            f"the checkpoint has {num_rows} rows of table {name!r}, more than its "
            f"vocabulary_size={table.num_rows}: restore all, and put what to_logical "
            "returns of it, cut, into a smaller state by from_logical"
        )
    if num_rows < table.num_rows:
        _check_key(args, f"rows {num_rows} to {table.num_rows - 1} of table {name!r}")


def _check_key(args: RestoreTables, missing: str) -> None:
    if args.key is None:
        raise CheckpointMismatchError(
            f"the checkpoint lacks {missing}: pass key=jax.random.key(...) to have "
            "what it lacks made by init"
        )


def _completed(
    args: RestoreTables,
    arrays: Mapping[str, Mapping[str, jax.Array]],
    rows: Mapping[str, int],
    wanted: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
) -> Mapping[str, Mapping[str, jax.Array]]:
    """Returns all arrays that are wanted; makes those that are not restored."""
    if args.key is None:
        return arrays
    keys = args.like.layout.keys(args.key)
    found = {}
    for table in args.like.layout.tables:
        name, own = table.name, arrays.get(table.name, {})
        if len(own) < len(wanted[name]) or rows[name] < table.num_rows:
            new = new_arrays(table, keys[name])
            for slot in table.optimizer.rule.slots:
                if slot.initial == "weights" and slot.name not in own and own:
                    dtype = wanted[name][slot.name].dtype
                    own = {**own, slot.name: own[PARAMETERS].astype(dtype, copy=True)}
            own = {
                slot: grown(own.get(slot), rows.get(name, 0), new[slot], like)
                for slot, like in wanted[name].items()
            }
        found[name] = own
    return found


def _unreadable(directory: Any) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the checkpoint in {directory} cannot be read; it is truncated, corrupt, or "
        "no item of SaveTables: restore one before, as restore_latest does"
    )
