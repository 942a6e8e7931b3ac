"""A kernel of the vector subcores that updates arrays in place."""

from collections.abc import Callable
from typing import Any

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
    kernel: Callable[..., Any] = pl.kernel(subcore, mesh=mesh, **options)
    # Not `jax.new_ref`: references that are open outside of the call do not pass
    # through `custom_vmap`.
    return pl.run_state(lambda refs: kernel(*read, *refs))(updated)
