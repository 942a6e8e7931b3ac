"""The last checkpoint that can be restored."""

import warnings
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from sparse_adam.checkpoint.errors import (
    CheckpointMismatchError,
    CorruptCheckpointError,
)


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
        >>> from sparse_adam.checkpoint import RestoreTables, SaveTables
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
    manager.reload()  # a save that failed made it forget those it was to replace
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
