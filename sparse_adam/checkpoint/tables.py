"""The item of a checkpoint that holds embedding tables and their slots."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_adam.checkpoint.errors import CheckpointMismatchError
from sparse_adam.checkpoint.handler import CHECKSUMS, CheckedHandler, unreadable
from sparse_adam.embedding import EmbeddingState
from sparse_adam.embedding.optimizer import PARAMETERS
from sparse_adam.embedding.saved import (
    from_saved,
    grown,
    new_arrays,
    on_device,
    targets,
    to_saved,
)
from sparse_adam.embedding.stacks import Table
from sparse_adam.embedding.step import STEP


class TablesHandler(CheckedHandler):
    """Reads and writes the item of `SaveTables` and `RestoreTables`."""

    def _to_write(self, args: "SaveTables") -> tuple[Any, dict[str, Any]]:
        tables = args.state.layout.tables
        about: dict[str, Any] = {
            "num_rows": {table.name: table.num_rows for table in tables}
        }
        if args.state.step is not None:
            about[STEP] = int(args.state.step)
        return to_saved(args.state), about

    def restore(self, directory: Any, args: "RestoreTables") -> EmbeddingState:
        """Returns the state that `args` describes."""
        tree, about = self._described(directory)
        try:
            saved = {
                name: {slot: own for slot, own in arrays.items() if slot != STEP}
                for name, arrays in tree.items()
            }
            rows = {
                name: next(iter(arrays.values())).shape[0]
                for name, arrays in saved.items()
            } | about.get("num_rows", {})
        except Exception as error:  # it is another tree
            raise unreadable(directory, error) from error
        step = about[STEP] if STEP in about else self._step(directory, tree)
        wanted = targets(args.like)
        _check_fit(args, saved, rows, step)
        found = {
            name: {slot: like for slot, like in own.items() if slot in saved[name]}
            for name, own in wanted.items()
            if name in saved
        }
        read = self._read(directory, found, about.get(CHECKSUMS, {}))
        arrays = jax.tree.map(on_device, read, found)
        return from_saved(args.like, _completed(args, arrays, rows, wanted), step or 0)

    def _step(self, directory: Any, tree: Any) -> int | None:
        """Returns the step of a checkpoint of what `to_logical` returns; None is none.

        `SaveTables` writes it beside the arrays; there it is one of them.
        """
        names = [name for name, arrays in tree.items() if STEP in arrays]
        if not names:
            return None
        like = {names[0]: {STEP: jax.ShapeDtypeStruct((), np.int32)}}
        return int(self._read(directory, like, {})[names[0]][STEP])


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
        >>> from sparse_adam.checkpoint import RestoreTables
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
