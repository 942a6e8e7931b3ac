"""Over which axes of the mesh arrays vary, which `jax.shard_map` checks."""

from typing import Any, TypeVar

import jax
from jax import lax

_Tree = TypeVar("_Tree")


def varying(tree: Any) -> set[str]:
    """Returns the axes of the mesh over which any of the arrays varies."""
    found = (jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    return set().union(*found)


def vary(tree: _Tree, *others: Any, axes: tuple[str, ...] = ()) -> _Tree:
    """Casts arrays to vary over `axes` and over those that they or others vary over."""
    wanted = sorted(varying((tree, others)) | set(axes))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in wanted if axis not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
