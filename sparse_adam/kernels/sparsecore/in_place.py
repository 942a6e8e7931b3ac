"""A kernel of the vector subcores that updates arrays in place."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu_sc as plsc


def update_in_place(
    subcore: Callable[..., None],
    read: tuple[Any, ...],
    updated: tuple[Any, ...],
    *,
    mesh: plsc.VectorSubcoreMesh,
    **options: Any,
) -> Any:
    """Runs `subcore(*read, *updated, *scratch)` on references; returns `updated`.

    The options are those of `pl.kernel`.
    """
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(updated)):
        return _by_aliases(subcore, read, updated, mesh, options)
    kernel: Callable[..., Any] = pl.kernel(subcore, mesh=mesh, **options)
    # Not `jax.new_ref`: references that are open outside of the call do not pass
    # through `custom_vmap`.
    return pl.run_state(lambda refs: kernel(*read, *refs))(updated)


def _by_aliases(
    subcore: Callable[..., None],
    read: tuple[Any, ...],
    updated: tuple[Any, ...],
    mesh: plsc.VectorSubcoreMesh,
    options: dict[str, Any],
) -> Any:
    """The same for arrays that vary over the axes of a `shard_map`.

    jax 0.12 refuses references to them. It makes aliased arrays of all references in
    the end, but only a function that is not public takes arrays and their aliases.
    """
    from jax._src.pallas import mpmd

    def aliased(*refs: Any) -> None:
        # What goes out stands behind what comes in, and is the same memory.
        subcore(*refs[: len(read)], *refs[len(read) + len(updated) :])

    first = len(jax.tree.leaves(read))
    count = len(jax.tree.leaves(updated))
    kernel: Callable[..., Any] = mpmd._mpmd_map(
        [(mesh, aliased)],
        # Not plain shapes: an output varies as its input does.
        jax.eval_shape(lambda *x: x, *updated),
        input_output_aliases={first + i: i for i in range(count)},
        **options,
    )
    return kernel(*read, *updated)
