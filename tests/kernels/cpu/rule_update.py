"""An update of a small table by any rule, in any storage, and what it must give."""

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np

from sparse_adam import reference
from sparse_adam.kernels import cpu
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import Limits, UpdateRule
from tests import helpers
from tests.helpers import assert_bitwise_equal
from tests.rules.pairs import Pair

MODES = {
    "lazy": {"lazy": True, "accumulate": True},
    "all_rows": {"lazy": False, "accumulate": True},
    "each_occurrence": {"lazy": True, "accumulate": False},
}
NUM_ROWS, NUM_IDS = 40, 64


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The traced numbers of an update; None is one that does not count."""

    rate: float = 0.01
    decay: float | None = None
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class RuleUpdate:
    """An update of some table by a rule, and how it is stored."""

    rule: UpdateRule
    mode: str = "lazy"
    numbers: Numbers = Numbers()
    limits: Limits = Limits()  # noqa: RUF009
    weighted: bool = False
    dim: int = 20
    dtypes: str = "float32"  # or "bfloat16", or "mixed"
    packed: bool = False

    @property
    def per_row(self) -> list[bool]:
        return [False, *(slot.per == "row" for slot in self.rule.slots)]

    @property
    def array_dtypes(self) -> list[np.dtype]:
        pattern = {
            "float32": [np.float32],
            "bfloat16": [ml_dtypes.bfloat16],
            "mixed": [ml_dtypes.bfloat16, np.float32],
        }[self.dtypes]
        return [
            np.dtype(np.float32 if per_row else pattern[i % len(pattern)])
            for i, per_row in enumerate(self.per_row)
        ]

    def arrays(self) -> dict[str, Any]:
        """The state `[V, D]` or `[V]`, and a batch with ids outside of the table."""
        rng = np.random.default_rng(self.dim)
        state: list[Any] = [rng.standard_normal((NUM_ROWS, self.dim))]
        for slot in self.rule.slots:
            if slot.name == "steps":
                state.append(rng.integers(0, 50, NUM_ROWS))
            elif slot.name in ("momenta", "linears"):
                state.append(rng.standard_normal((NUM_ROWS, self.dim)))
            else:
                shape = (NUM_ROWS, self.dim) if slot.per == "element" else NUM_ROWS
                state.append(rng.uniform(0.25, 1, shape))
        num_grads = NUM_IDS // 2 if self.weighted else NUM_IDS
        sources = np.arange(NUM_IDS)
        if self.weighted:
            sources = rng.integers(-1, num_grads + 1, NUM_IDS)
        # Of these every sum is exact in float32.
        grads = (2 * rng.integers(-32, 32, (num_grads, self.dim)) + 1) / 16
        gains = rng.choice([-1.5, -0.5, 0.5, 1.5], NUM_IDS).astype(np.float32)
        return {
            "state": [
                x.astype(d) for x, d in zip(state, self.array_dtypes, strict=True)
            ],
            "grads": grads.astype(np.float32),
            "ids": rng.integers(-3, NUM_ROWS // 2, NUM_IDS).astype(np.int32),
            "sources": sources.astype(np.int32),
            "gains": gains if self.weighted else None,
        }

    def attributes(self) -> dict[str, Any]:
        """What the library is told."""
        places = cpu.plain_places(NUM_ROWS, self.dim, self.array_dtypes, self.per_row)
        if self.packed:
            places = Lines(self.dim, self.array_dtypes).places()
        return {
            **places,
            **cpu.rule_attributes(self.rule, self.limits),
            **MODES[self.mode],
            "decays": self.numbers.decay is not None,
            "scales": self.numbers.scale is not None,
        }

    def vector(self) -> np.ndarray:
        """The numbers as an operand; those that do not count are NaN."""
        found = dataclasses.astuple(self.numbers)
        return np.array([np.nan if x is None else x for x in found], np.float32)

    def stored(self, state: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The arrays that the library is given."""
        if not self.packed:
            return tuple(state)
        return (Lines(self.dim, self.array_dtypes).pack(state),)

    def restored(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The state, of what it has made of them."""
        if not self.packed:
            return arrays
        lines = Lines(self.dim, self.array_dtypes)
        state = lines.unpack(arrays[0])
        # What is no weight is as it was.
        assert_bitwise_equal(arrays[0], lines.pack(state))
        return state

    def check(self, new: list[np.ndarray], pair: Pair) -> None:
        """Compares a new state with the reference."""
        assert pair.rule == self.rule
        given = self.arrays()
        old = given["state"]
        right, bounds = _right(dataclasses.replace(self, packed=False), pair)
        repeats = 1 if self.mode != "each_occurrence" else 2.5  # errors of steps before
        names = ["weights", *(slot.name for slot in self.rule.slots)]
        for name, x, before, value, bound in zip(
            names, new, old, right, bounds, strict=True
        ):
            helpers.assert_close_steps(
                x,
                before,
                value.astype(np.float32),
                tolerance=(repeats * bound).astype(np.float32),
                name=f"{name} of {self}",
            )
            if self.mode != "all_rows":
                untouched = ~np.isin(np.arange(NUM_ROWS), given["ids"])
                assert untouched.any()
                assert_bitwise_equal(x[untouched], before[untouched])

    def gradients(self) -> np.ndarray:
        """Returns the gradient of each occurrence: float64 `[N, D]`.

        Where they are summed, that of a row stands at one of its occurrences.
        """
        given = self.arrays()
        ids, sources, gains = given["ids"], given["sources"], given["gains"]
        each = np.zeros((NUM_IDS, self.dim))
        valid = (sources >= 0) & (sources < len(given["grads"]))
        each[valid] = given["grads"][sources[valid]]
        if gains is not None:
            each *= gains[:, None]
        if self.mode == "each_occurrence":
            return each
        _, first, places = np.unique(ids, return_index=True, return_inverse=True)
        summed = np.zeros_like(each)
        np.add.at(summed, first[places], each)
        return summed


@functools.cache
def _right(update: RuleUpdate, pair: Pair) -> tuple[Any, list[np.ndarray]]:
    """Returns the new state in float64, and how far one step in float32 may be off."""
    given = update.arrays()
    limits, numbers = update.limits, update.numbers

    def by_reference(state: Any, grads: Any) -> tuple[np.ndarray, ...]:
        return reference.sparse_update(
            *(state, given["ids"], grads, pair.step),
            learning_rate=numbers.rate,
            weight_decay_factor=numbers.decay,
            gradient_scale=numbers.scale,
            clipvalue=(limits.gradient_min, limits.gradient_max),
            clip_weight_min=limits.weight_min,
            clip_weight_max=limits.weight_max,
            lazy=update.mode != "all_rows",
            use_gradient_accumulation=update.mode != "each_occurrence",
        )

    state = [x.astype(np.float64) for x in given["state"]]
    new, bounds = pair.roundings(by_reference, state, update.gradients(), numbers.rate)
    bounds[0] = 1.5 * bounds[0]  # the weights take the roundings of the slots along
    return new, bounds


class Lines:
    """Packed storage of any number of arrays, written weight by weight.

    Four rows of up to 32 lanes share lines, a wider one has lines of its own. Two
    bfloat16 arrays share a plane, an odd one is widened.
    """

    def __init__(self, dim: int, dtypes: list[np.dtype]) -> None:
        self.rows_per_group = 4 if dim <= 32 else 1
        self.stride = 32 if dim <= 32 else LANES * -(-dim // LANES)
        self.dim, self.dtypes = dim, dtypes
        narrow = [i for i, dtype in enumerate(dtypes) if dtype != np.float32]
        self.planes = [(i,) for i, dtype in enumerate(dtypes) if dtype == np.float32]
        self.planes += [tuple(narrow[i : i + 2]) for i in range(0, len(narrow), 2)]

    @property
    def lines_per_group(self) -> int:
        return len(self.planes) * (self.rows_per_group * self.stride // LANES)

    def line(self, plane: int, block: int) -> int:
        return plane * (self.lines_per_group // len(self.planes)) + block

    num_rows = NUM_ROWS

    def places(self) -> dict[str, Any]:
        return cpu.packed_places(self)

    def words(self, plane: int) -> np.ndarray:
        rows, lanes = np.mgrid[:NUM_ROWS, : self.dim]
        group, place = np.divmod(rows, self.rows_per_group)
        line = group * self.lines_per_group + self.line(plane, 0)
        return line * LANES + place * self.stride + lanes

    def pack(self, state: list[np.ndarray]) -> np.ndarray:
        groups = -(-NUM_ROWS // self.rows_per_group)
        size = groups * self.lines_per_group * LANES
        lines = np.random.default_rng(0).integers(0, 2**32, size, np.uint32)
        for plane, arrays in enumerate(self.planes):
            words = self.words(plane)
            bits = [state[i].astype(np.float32).view(np.uint32) for i in arrays]
            lines[words] = bits[0] if len(bits) == 1 else bits[0] >> 16 | bits[1]
        return lines.reshape(-1, LANES).view(np.int32)

    def unpack(self, lines: np.ndarray) -> list[np.ndarray]:
        flat = np.ascontiguousarray(lines).view(np.uint32).reshape(-1)
        state = {}
        for plane, arrays in enumerate(self.planes):
            words = flat[self.words(plane)]
            halves = [words] if len(arrays) == 1 else [words << 16, words & 0xFFFF0000]
            for i, bits in zip(arrays, halves, strict=True):
                state[i] = bits.view(np.float32).astype(self.dtypes[i])
        return [state[i] for i in range(len(self.dtypes))]
