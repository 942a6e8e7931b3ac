"""Calls of the C++ library itself with arguments that no op would make.

A call is drawn as the package would make it, and then some of its attributes and arrays
are spoilt: out of range, of another shape or dtype, gone, or one too many. The library
must refuse it, and say why, or do what its arguments say. What they say is known from
the attributes alone: `Rows` finds the weights in the bytes by NumPy.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.cpu import library, places

BFLOAT16 = np.dtype(jnp.bfloat16)
# What the library says, or XLA before it is asked.
REFUSALS = re.compile(
    r"sparse_adam on a CPU: \w|Unexpected attribute|"
    r"Wrong (number of )?(argument|array|attribute|buffer|scalar)"
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of the library's functions.

    Attributes:
        target: the function.
        operands: by name, in order. Those named "state..." are updated in place.
        attributes: what the library is told when the call is compiled.
        result: of a lookup, its shape and dtype.
        in_place: whether the state is.
        faults: what was spoilt.
    """

    target: str
    operands: dict[str, np.ndarray]
    attributes: dict[str, Any]
    result: tuple[tuple[int, ...], Any] = ((), "float32")
    in_place: bool = True
    faults: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shapes = {name: f"{x.dtype}{x.shape}" for name, x in self.operands.items()}
        words = [self.target, f"faults={self.faults}", f"operands={shapes}"]
        words += [f"{self.attributes}", f"{self.result}", f"{self.in_place}"]
        return f"Call({', '.join(words)})"

    @property
    def state(self) -> list[str]:
        """The names of what is updated."""
        return [name for name in self.operands if name.startswith("state")]

    def but(self, **operands: np.ndarray) -> "Call":
        """Returns a copy with some operands replaced."""
        return dataclasses.replace(self, operands=self.operands | operands)

    def run(self) -> list[np.ndarray]:
        """Returns the results; raises what JAX makes of an error."""
        operands, state = self.operands, self.state
        given = [jnp.asarray(x) for x in operands.values()]
        if self.target == library.UPDATE:
            names = list(operands)
            results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
            results = [results[names.index(name)] for name in state]
            aliases = {names.index(name): i for i, name in enumerate(state)}
        else:
            results, aliases = [jax.ShapeDtypeStruct(*self.result)], {}
        call = jax.ffi.ffi_call(
            self.target,
            results,
            input_output_aliases=aliases if self.in_place else None,
        )
        return [np.array(x) for x in call(*given, **self.attributes)]


def check(call: Call) -> str:
    """Makes a call; returns "refused" or "right".

    Raises:
        AssertionError: it is neither, or a good call was refused.
    """
    try:
        found = call.run()
    except jax.errors.JaxRuntimeError as error:
        assert call.faults, f"a good call was refused: {call}: {error}"
        assert REFUSALS.search(str(error)), f"no reason is given: {call}: {error}"
        return "refused"
    if not any(x.size for x in found):
        pass  # XLA does not call the library
    elif call.target == library.UPDATE:
        _check_update(call, found)
    else:
        _check_lookup(call, found[0])
    return "right"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows `[V, D]` of an array stand, or its numbers `[V]`."""

    where: np.ndarray
    encoding: str

    @classmethod
    def of(
        cls, attributes: dict[str, Any], first: int, encoding: int, dim: int
    ) -> "Rows":
        """Finds them as `kernels/cpu/places.py` says; `dim` is 0 for `[V]`."""
        rows = np.arange(int(attributes["num_rows"]))
        name = places.ENCODINGS[encoding]
        if dim == 0:
            return cls(first + rows, name)
        group, place = np.divmod(rows, int(attributes["rows_per_group"]))
        starts = group * int(attributes["group_stride"])
        starts = first + starts + place * int(attributes["stride"])
        return cls(starts[:, None] + np.arange(dim), name)

    def read(self, words: np.ndarray) -> np.ndarray:
        """Returns the numbers, as float32 or as bfloat16."""
        bits = words[self.where]
        if self.encoding == "bfloat16":
            return bits.view(BFLOAT16)
        if self.encoding == "low_half":
            bits = bits << 16
        elif self.encoding == "high_half":
            bits = bits & np.uint32(0xFFFF0000)
        found = bits.view(np.float32)
        return found if self.encoding == "float32" else found.astype(BFLOAT16)

    def written(self, words: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Returns the words with these numbers in their places."""
        new, bits = words.copy(), numbers.astype(np.float32).view(np.uint32)
        if self.encoding == "bfloat16":
            bits = (bits >> 16).astype(np.uint16)
        elif self.encoding == "low_half":
            bits = words[self.where] & np.uint32(0xFFFF0000) | bits >> 16
        elif self.encoding == "high_half":
            bits = words[self.where] & np.uint32(0xFFFF) | bits
        new[self.where] = bits
        return new


def _words(x: np.ndarray) -> np.ndarray:
    """Returns an array's bytes as numbers of its items' size."""
    return x.reshape(-1).view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def _check_update(call: Call, found: list[np.ndarray]) -> None:
    """Holds an update to that of plain arrays whose rows stand the other way round.

    Both sum the same numbers exactly, so they may differ in no bit.
    """
    told, dim = call.attributes, call.operands["grads"].shape[1]
    old = [_words(call.operands[name]) for name in call.state]
    new = [_words(x) for x in found]
    rows = [
        Rows.of(told, int(first), int(encoding), 0 if alone else dim)
        for first, encoding, alone in zip(
            told["first"], told["encodings"], told["per_row"], strict=True
        )
    ]
    which = [i if len(old) > 1 else 0 for i in range(len(rows))]
    arrays = [own.read(old[i]) for own, i in zip(rows, which, strict=True)]
    for own, i in zip(rows, which, strict=True):
        if own.encoding == "widened" and (old[i][own.where] & 0xFFFF).any():
            return  # no bfloat16 numbers
    plain = _turned(call, arrays)
    for own, i, x, before in zip(rows, which, plain, arrays, strict=True):
        np.testing.assert_array_equal(own.read(new[i]), x, err_msg=str(call))
        if told["lazy"]:
            kept = ~np.isin(np.arange(len(x)), call.operands["ids"])
            np.testing.assert_array_equal(x[kept].view("u1"), before[kept].view("u1"))
        # Two NaNs may differ in their bits.
        old[i], new[i] = own.written(old[i], x), own.written(new[i], x)
    for before, after in zip(old, new, strict=True):
        assert (before == after).all(), f"it wrote beside the rows: {call}"


def _turned(call: Call, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the same update of plain arrays, from the last row to the first one."""
    told, ids = call.attributes, call.operands["ids"]
    dim = call.operands["grads"].shape[1]
    num_rows = int(told["num_rows"])
    # Noise depends on where a row stands.
    step = 1 if call.operands["seeds"].size else -1
    inside = (ids >= 0) & (ids < num_rows) & (step < 0)
    ids = np.where(inside, num_rows - 1 - ids.astype(np.int64), ids).astype(np.int32)
    operands = {x: y for x, y in call.operands.items() if x not in call.state}
    operands["ids"] = ids
    operands |= {f"state_{i}": x[::step] for i, x in enumerate(arrays)}
    per_row = [bool(x) for x in told["per_row"]]
    dtypes = [x.dtype for x in arrays]
    where = places.plain_places(num_rows, dim, dtypes, per_row)
    turned = Call(call.target, operands, {**told, **where})
    return [x[::step] for x in turned.run()]


def _check_lookup(call: Call, found: np.ndarray) -> None:
    """Compares rows, or their sums, with those that NumPy finds."""
    told, operands = call.attributes, call.operands
    rows = Rows.of(told, int(told["first"]), int(told["encoding"]), found.shape[1])
    table = rows.read(_words(operands["stored"])).astype(np.float32)
    ids = operands["ids"]
    inside = (ids >= 0) & (ids < len(table))
    picked = np.where(inside[:, None], table[np.where(inside, ids, 0)], np.float32(0))
    if call.target == library.LOOKUP:
        np.testing.assert_array_equal(found.astype(np.float32), picked, str(call))
        return
    count, samples = len(found), operands["samples"]
    if samples.size == 0:
        samples = np.repeat(np.arange(count), ids.size // max(count, 1))
    inside &= (samples >= 0) & (samples < count)
    gains, scales = operands["gains"], operands["scales"]
    factors = gains[inside] if gains.size else np.ones(inside.sum())
    with np.errstate(all="ignore"):  # words that are no numbers
        parts = factors[:, None] * picked[inside].astype(np.float64)
        sums, sizes = np.zeros((2, count, found.shape[1]))
        np.add.at(sums, samples[inside], parts)
        np.add.at(sizes, samples[inside], np.abs(parts))
        if scales.size:
            sums, sizes = scales[:, None] * sums, np.abs(scales)[:, None] * sizes
        rounding = 2.0**-8 if found.dtype == BFLOAT16 else 0
        # XLA takes numbers of less than 2**-126 for 0.
        bound = (ids.size + 2) * (2.0**-23 * sizes + 2.0**-126)
        bound += rounding * np.abs(sums)
        wrong = np.abs(found.astype(np.float64) - sums) > bound
    known = sizes < 1e30  # what float32 holds, NaNs left out
    assert not (wrong & known).any(), f"wrong sums: {call}"
    assert not found[(sizes == 0).all(1)].any(), f"no id is no zeros: {call}"
