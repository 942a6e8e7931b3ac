"""The item of a checkpoint that holds all else: dense parameters, their optimizer."""

import dataclasses
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_adam.checkpoint.errors import CheckpointMismatchError
from sparse_adam.checkpoint.handler import CHECKSUMS, CheckedHandler, by_path


class ArraysHandler(CheckedHandler):
    """Reads and writes the item of `SaveArrays` and `RestoreArrays`."""

    def _to_write(self, args: "SaveArrays") -> tuple[Any, dict[str, Any]]:
        return args.tree, {}

    def restore(self, directory: Any, args: "RestoreArrays") -> Any:
        """Returns the tree that `args` describes."""
        tree, about = self._described(directory)
        saved = {path: tuple(x.shape) for path, x in by_path(tree).items()}
        wanted = {path: np.shape(x) for path, x in by_path(args.like).items()}
        for path in saved.keys() | wanted.keys():
            there, asked = saved.get(path), wanted.get(path)
            if there != asked:
                raise CheckpointMismatchError(
                    f"the checkpoint in {directory} has {_array(there)} at {path!r}, "
                    f"and like has {_array(asked)}: they must have the same arrays"
                )
        read = self._read(directory, args.like, about.get(CHECKSUMS, {}))
        return jax.tree.map(_as, read, args.like)


@ocp.args.register_with_handler(ArraysHandler, for_save=True)
@dataclasses.dataclass
class SaveArrays(ocp.args.CheckpointArgs):
    """Saves any tree of arrays, as an item of a checkpoint.

    It is as `orbax.checkpoint.args.StandardSave`, with what that has not: checksums,
    which tell if the numbers are those that were saved.

    Args:
        tree: of arrays of JAX or NumPy: dense parameters, the state of their optimizer.

    Examples:
        >>> import tempfile
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import orbax.checkpoint as ocp
        >>> from sparse_adam.checkpoint import RestoreArrays
        >>> dense = {"w": jnp.eye(2), "b": jnp.zeros(2)}
        >>> with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     saving = manager.save(7, args=SaveArrays(dense))
        ...     found = manager.restore(7, args=RestoreArrays(dense))
        >>> found["w"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    tree: Any


@ocp.args.register_with_handler(ArraysHandler, for_restore=True)
@dataclasses.dataclass
class RestoreArrays(ocp.args.CheckpointArgs):
    """Restores a tree of arrays, which `SaveArrays` or `StandardSave` has saved.

    Args:
        like: a tree of arrays, or of the shapes of `jax.eval_shape`. What is restored
            has its dtypes and its shardings, and is of NumPy where it is.

    Raises:
        CheckpointMismatchError: the checkpoint has other arrays, or other shapes.
        CorruptCheckpointError: it cannot be read, or was changed after it was saved.

    Example: see `SaveArrays`.
    """

    like: Any


def _array(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"an array of shape {shape}"


def _as(read: Any, like: Any) -> Any:
    """Returns an array of the kind of another one."""
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        read = jax.numpy.asarray(read)
    return read.astype(like.dtype)
