"""What kernels have in common: limits of rows and of memory, and cost estimates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import pallas as pl

from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import check_rule

_SUM_FLOPS = 2  # for each element: weigh and add a gradient


def unsupported_rows(layout: Layout, names: Sequence[str]) -> str | None:
    """Says why rows of these arrays cannot be moved one by one, or returns None."""
    if layout.storage == "packed":
        return None
    if layout.dim % LANES:
        return (
            f"D={layout.dim} is not a multiple of {LANES}: a TPU does not store such a "
            "table row by row; pack it"
        )
    for name, dtype in zip(names, layout.dtypes, strict=True):
        if dtype != np.float32:
            return (
                f"{name} is {dtype}; rows move one by one, and only float32 rows are "
                "words of their own (two bfloat16 rows share each 32-bit word)"
            )
    return None


def cost_estimate(spec: UpdateSpec, rows: int, num_bytes: int) -> pl.CostEstimate:
    """Returns what XLA is told of a kernel that steps so many rows."""
    facts, elements = check_rule(spec.rule), rows * spec.dim
    return pl.CostEstimate(
        flops=(facts.flops + _SUM_FLOPS) * elements,
        transcendentals=facts.transcendentals * elements,
        bytes_accessed=num_bytes,
    )


def check_fits(
    config: Any, needed: int, available: int, memory: str, chosen: Any
) -> None:
    """Refuses block sizes that a memory does not hold.

    Args:
        config: the block sizes.
        needed: bytes that they need.
        available: bytes that there are.
        memory: what the memory is called.
        chosen: block sizes that would do.

    Raises:
        ValueError: they need more than there is.
    """
    if needed > available:
        raise ValueError(
            f"{config=} needs {needed:,} bytes of {memory}, which has {available:,}: "
            f"pass {chosen}, or no config"
        )
