"""A state as the bytes that the CPU kernel works on, in NumPy: plain, or packed.

Packed lines are written and read weight by weight, from nothing but the layout's sizes.
What no weight stands in is full of noise, which no update may read or change.
"""

import numpy as np

from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.tiles import LANES


def pack(state: tuple[np.ndarray, ...], seed: int = 0) -> np.ndarray:
    """Lines of three arrays `[V, D]`: uint32, as long as the layout says."""
    layout = _layout(state)
    rng = np.random.default_rng(seed)
    lines = rng.integers(0, 2**32, layout.shape, np.uint32).reshape(-1)
    for x, (places, half) in zip(state, _places(layout), strict=True):
        bits = x.astype(np.float32).view(np.uint32)
        if half == "low":
            lines[places] = lines[places] & 0xFFFF0000 | bits >> 16
        elif half == "high":
            lines[places] = lines[places] & 0xFFFF | bits
        else:
            lines[places] = bits
    return lines.reshape(layout.shape)


def unpack(
    lines: np.ndarray, like: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three arrays, of the dtypes of `like`."""
    words, state = lines.reshape(-1), []
    for x, (places, half) in zip(like, _places(_layout(like)), strict=True):
        bits = words[places]
        if half == "low":
            bits = bits << 16
        elif half == "high":
            bits = bits & 0xFFFF0000
        if x.dtype != np.float32:
            assert not (bits & 0xFFFF).any(), "this is no bfloat16"
        state.append(bits.view(np.float32).astype(x.dtype))
    w, m, v = state
    return w, m, v


def _layout(state: tuple[np.ndarray, ...]) -> PackedLayout:
    num_rows, dim = state[0].shape
    return PackedLayout(num_rows, dim, tuple(x.dtype for x in state))


def _places(layout: PackedLayout) -> list[tuple[np.ndarray, str]]:
    """For each array the word of each weight, and the half of it that it has."""
    rows, columns = np.mgrid[: layout.num_rows, : layout.dim]
    group, place = np.divmod(rows, layout.rows_per_group)
    block, lane = np.divmod(columns, LANES)
    found = {}
    for plane, arrays in enumerate(layout.planes):
        line = group * layout.lines_per_group + plane * layout.blocks + block
        places = line * LANES + place * layout.stride + lane
        halves = ("low", "high") if len(arrays) == 2 else ("both",)
        found |= {a: (places, h) for a, h in zip(arrays, halves, strict=True)}
    return [found[t] for t in range(3)]
