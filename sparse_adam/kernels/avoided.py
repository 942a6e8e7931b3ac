"""Kernels that a program can do without, where no argument of a call chooses."""

import contextlib
from collections.abc import Iterator

import jax

KERNELS = ("lookup", "sort")
_avoided: set[str] = set()


def avoid_kernels(*kernels: str) -> None:
    """Leaves kernels out of the programs that are made from now on.

    An update takes `implementation=` and `config=`. Lookups and sorts choose by
    themselves. If one of their kernels does not work on a TPU, leave it out by this,
    once, before anything is compiled: XLA then does the same, more slowly. What JAX has
    compiled before is forgotten, and compiles again.

    Args:
        *kernels: those to leave out, and no others: "lookup" reads and combines rows on
            SparseCores; "sort" sorts the ids of a batch. None takes all again.

    Raises:
        ValueError: there is no kernel of a name.

    Examples:
        >>> import sparse_adam
        >>> sparse_adam.avoid_kernels("lookup", "sort")
        >>> sparse_adam.avoid_kernels()
    """
    unknown = sorted({*kernels} - {*KERNELS})
    if unknown:
        raise ValueError(f"kernels={unknown} must be some of {KERNELS}")
    _avoided.clear()
    _avoided.update(kernels)
    jax.clear_caches()


def avoided(kernel: str) -> bool:
    """Tells whether a kernel is to be left out. Asked when a program is made."""
    return kernel in _avoided


@contextlib.contextmanager
def avoiding(kernel: str) -> Iterator[None]:
    """Leaves one kernel more out of the programs that are made in the block."""
    before = tuple(_avoided)
    avoid_kernels(*before, kernel)
    try:
        yield
    finally:
        avoid_kernels(*before)
