"""The item of a checkpoint that holds all else: dense parameters, their optimizer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sparse_adam.checkpoint.errors import CheckpointMismatchError
from sparse_adam.checkpoint.handler import CHECKSUMS, CheckedHandler, by_path


class ArraysHandler(CheckedHandler):
    """Reads and writes the item of `SaveArrays` and `RestoreArrays`."""

    def _to_write(self, args: "SaveArrays") -> tuple[Any, dict[str, Any]]:
        return jax.tree.map(_array, args.tree), {}

    def restore(self, directory: Any, args: "RestoreArrays") -> Any:
        """Returns the tree that `args` describes."""
        tree, about = self._described(directory)
        saved = {path: np.shape(x) for path, x in by_path(tree).items()}
        wanted = {path: np.shape(x) for path, x in by_path(args.like).items()}
        for path in saved.keys() | wanted.keys():
            there, asked = saved.get(path), wanted.get(path)
            if there != asked:
                raise CheckpointMismatchError(
                    f"the checkpoint in {directory} has {_kind(there)} at {path!r}, "
                    f"and like has {_kind(asked)}: they must have the same arrays"
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
        tree: of arrays of JAX or NumPy, and of numbers: dense parameters, the state of
            their optimizer. It may not have random keys.

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

    def __post_init__(self) -> None:
        # An error in the middle of a save leaves Orbax waiting for minutes.
        for path, x in by_path(self.tree).items():
            if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
                raise TypeError(
                    f"SaveArrays got random keys at {path!r}: pass "
                    "jax.random.key_data of them, or save them as another item by "
                    "orbax.checkpoint.args.JaxRandomKeySave"
                )


@ocp.args.register_with_handler(ArraysHandler, for_restore=True)
@dataclasses.dataclass
class RestoreArrays(ocp.args.CheckpointArgs):
    """Restores a tree of arrays, which `SaveArrays` or `StandardSave` has saved.

    Args:
        like: a tree of arrays, or of the shapes of `jax.eval_shape`. What is restored
            has its dtypes and its shardings, and is of NumPy, or a number, where it is.

    Raises:
        CheckpointMismatchError: the checkpoint has other arrays, or other shapes.
        CorruptCheckpointError: it cannot be read, or was changed after it was saved.

    Example: see `SaveArrays`.
    """

    like: Any


def _array(x: Any) -> Any:
    """Returns an array as it is, and a number of Python as an array of NumPy.

    So all leaves have a shape and a dtype, which are compared when they are restored.
    """
    return x if hasattr(x, "dtype") else np.asarray(x)


def _kind(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"an array of shape {shape}"


def _as(read: Any, like: Any) -> Any:
    """Returns an array, or a number, of the kind of another one."""
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(read, like.dtype)
    if isinstance(like, np.ndarray):
        return read.astype(like.dtype)
    return type(like)(read)
