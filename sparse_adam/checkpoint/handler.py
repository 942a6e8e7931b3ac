"""How an item of arrays is written, and how it is known that it is still the same."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_adam.checkpoint.errors import CorruptCheckpointError, corrupt
from sparse_adam.checkpoint.files import check_list, write_list
from sparse_adam.embedding.saved import checksums

CHECKSUMS = "checksums"


class CheckedHandler(ocp.AsyncCheckpointHandler):
    """Writes arrays with their sums, and reads them if all is as it was written.

    A subclass says what is written, by `_to_write`, and what a user gets, by `restore`.
    """

    def __init__(self) -> None:
        self._arrays = ocp.PyTreeCheckpointHandler()

    @abc.abstractmethod
    def _to_write(self, args: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the arrays, and what is noted of them beside their sums."""

    async def async_save(self, directory: Any, args: Any) -> Any:
        """Begins to write; returns when the state may be donated.

        Orbax has then copied what is on a device. What is in a CPU's memory it shares,
        and JAX gives no memory away that is shared: there the next update copies.
        """
        return await self._arrays.async_save(directory, args=self._array_args(args))

    def save(self, directory: Any, args: Any) -> None:
        """Writes what `args` has, and returns when all of it is in the directory.

        For those who call a handler without a manager, which uses `async_save`.
        """
        self._arrays.save(directory, args=self._array_args(args))

    def _array_args(self, args: Any) -> ocp.args.PyTreeSave:
        arrays, about = self._to_write(args)
        about = {CHECKSUMS: checksums(arrays)} | about
        return ocp.args.PyTreeSave(arrays, custom_metadata=about)

    def metadata(self, directory: Any) -> Any:
        """Returns the shapes and dtypes of the arrays."""
        return self._arrays.metadata(directory)

    def finalize(self, directory: Any) -> None:
        """Ends the writing of all processes; only one of them calls it."""
        self._arrays.finalize(directory)
        write_list(directory)

    def close(self) -> None:
        """Ends the threads with which Orbax writes; its manager calls this last."""
        self._arrays.close()

    def _described(self, directory: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the tree of what was saved, and what was noted of it."""
        check_list(directory)
        try:
            metadata = self.metadata(directory)
            return metadata.tree, dict(metadata.custom_metadata or {})
        except Exception as error:  # whatever Orbax meets in a broken file
            raise unreadable(directory, error) from error

    def _read(self, directory: Any, like: Any, sums: Mapping[str, Any]) -> Any:
        """Returns arrays in the shapes and the places wanted, in the dtypes saved.

        Args:
            directory: of the item.
            like: the shapes of some of the arrays that were saved. They may have more
                rows.
            sums: what `checksums` returned of all that were saved, if it is known.
        """
        how = jax.tree.map(_restore_args, like)
        args = ocp.args.PyTreeRestore(like, restore_args=how, partial_restore=True)
        try:
            read = self._arrays.restore(directory, args=args)
        except Exception as error:
            raise unreadable(directory, error) from error
        expected = by_path(sums)
        for path, value in by_path(checksums(read)).items():
            if expected.get(path, value) != value:
                raise corrupt(
                    directory, f"has other numbers in {path!r} than were saved"
                )
        return read


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by names such as "user/momenta"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def unreadable(directory: Any, error: Exception) -> CorruptCheckpointError:
    """Returns the error of an item that Orbax cannot read."""
    what = " ".join(str(error.__cause__ or error).split())[:300]
    return corrupt(
        directory,
        "cannot be read; it is truncated, corrupt, or was saved in another way "
        f"({what})",
    )


def _restore_args(like: Any) -> ocp.RestoreArgs:
    """Asks for an array in its own dtype, with as many rows as there are to be."""
    if getattr(like, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        sharding=like.sharding, global_shape=like.shape, strict=False
    )
