"""The update on a CPU: what the C++ library is told, and the call."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.kernels.tiles import LANES

LIBRARY = Path(__file__).parent / "sparse_adam_cpu.so"
_TARGET = "sparse_adam_cpu"
# As in `loops.h`.
ENCODINGS = ("float32", "bfloat16", "widened", "low_half", "high_half")


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    from sparse_adam.rules import AdamRule

    if type(spec.rule) is not AdamRule or spec.rule.bias_correction or spec.scales:
        return "its C++ library has no loop for this rule"
    return _load()


def bytes_moved(num_ids: int, num_unique: int, dim: int) -> int:
    """Least bytes of a float32 update: gradients once, three rows in and out, ids."""
    return 4 * (num_ids * dim + 6 * num_unique * dim + num_ids)


def cpu_update(
    state: State, batch: SortedBatch, scalars: StepScalars, spec: UpdateSpec
) -> State:
    """Updates the rows `batch.ids` (V for none), in any order, in place."""
    grads, ids, sources, gains = batch
    if grads.dtype not in (jnp.float32, jnp.bfloat16):
        grads = grads.astype(jnp.float32)
    if gains is None:
        gains = jnp.zeros((0,), jnp.float32)
    seeds = jnp.zeros((0,), jnp.int32) if scalars.seeds is None else scalars.seeds
    operands = (grads, ids, sources, gains, scalars.numbers[0], seeds)
    call = jax.ffi.ffi_call(
        _TARGET,
        spec.layout.shapes,
        input_output_aliases={len(operands) + i: i for i in range(len(state))},
    )
    return tuple(call(*operands, *state, **attributes(spec)))


def attributes(spec: UpdateSpec) -> dict[str, Any]:
    """Returns all that the library is told when the call is compiled."""
    hyper, limits = spec.rule, spec.limits

    def bound(value: float | None, otherwise: float) -> np.float32:
        return np.float32(otherwise if value is None else value)

    return {
        **_places(spec),
        "lazy": spec.lazy,
        "accumulate": spec.accumulate,
        "beta_1": np.float32(hyper.beta_1),
        "beta_2": np.float32(hyper.beta_2),
        "epsilon": np.float32(hyper.epsilon),
        "decay": np.float32(0),
        "decay_by_rate": False,
        "sum_inside_sqrt": hyper.sum_inside_sqrt,
        "gradient_min": bound(limits.gradient_min, -np.inf),
        "gradient_max": bound(limits.gradient_max, np.inf),
        "weight_min": bound(limits.weight_min, -np.inf),
        "weight_max": bound(limits.weight_max, np.inf),
    }


def _places(spec: UpdateSpec) -> dict[str, Any]:
    """Returns where the rows of each array begin, and how its numbers are encoded.

    Row r stands `r // rows_per_group * group_stride + r % rows_per_group * stride`
    items behind the first one.
    """
    layout = spec.layout
    rows_per_group, stride, group_stride = spec.num_rows, spec.dim, 0
    first, encodings = [0] * len(spec.dtypes), [dtype.name for dtype in spec.dtypes]
    if isinstance(layout, PackedLayout):
        rows_per_group, stride = layout.rows_per_group, layout.stride
        group_stride = layout.lines_per_group * LANES
        for plane, arrays in enumerate(layout.planes):
            pair = ("low_half", "high_half") if len(arrays) == 2 else ("widened",)
            for array, encoding in zip(arrays, pair, strict=True):
                first[array] = layout.line(plane, 0) * LANES
                if layout.dtypes[array] == jnp.bfloat16:
                    encodings[array] = encoding
    numbers = [ENCODINGS.index(encoding) for encoding in encodings]
    return {
        "num_rows": np.int32(spec.num_rows),
        "rows_per_group": np.int32(rows_per_group),
        "stride": np.int32(stride),
        "group_stride": np.int32(group_stride),
        "first": np.array(first, np.int32),
        "encodings": np.array(numbers, np.int32),
    }


@functools.cache
def _load() -> str | None:
    """Loads the library and shows its handler to XLA; returns why that failed."""
    if not LIBRARY.exists():
        return (
            "its C++ library was not built when this package was installed: that needs "
            "a C++17 compiler"
        )
    try:
        handler = ctypes.CDLL(str(LIBRARY)).sparse_adam_cpu
        capsule = jax.ffi.pycapsule(handler)
        jax.ffi.register_ffi_target(_TARGET, capsule, platform="cpu")
    except Exception as error:  # of the linker, or of another version of XLA
        return f"its C++ library does not load: {error}"
    return None
