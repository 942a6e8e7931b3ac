"""Calls of the C++ library itself with arguments that no op would make.

A call is drawn as the package would make it, and then some of its attributes and arrays
are spoilt: out of range, of another shape or dtype, gone, or one too many. The library
must refuse it, and say why, or do what its arguments say. What they say is known from
the attributes alone: `Rows` finds the weights in the bytes by NumPy.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sparse_adam.kernels import cpu
from sparse_adam.kernels.cpu import library, places
from sparse_adam.kernels.layout import Layout, PackedLayout, PlainLayout
from sparse_adam.rules import Limits
from tests.rules.pairs import PAIRS

# As hypothesis draws in a test: it minds the random numbers of type checks elsewhere.
Draw = Callable[[st.SearchStrategy[Any]], Any]
BFLOAT16 = np.dtype(jnp.bfloat16)
RULES = tuple(p.rule for p in PAIRS if cpu.unsupported_rule(p.rule) is None)
ROWS, WIDTHS, COUNTS = (1, 2, 7, 40), (1, 3, 16, 17, 32, 100, 128, 300), (0, 1, 7, 300)
WILD = (-1, -(2**31), 2**31 - 1)
# What the library says, or XLA before it is asked.
REFUSALS = re.compile(
    r"sparse_adam on a CPU: \w|Wrong (number of )?(argument|array|attribute|buffer|scalar)"
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
    if call.target == library.UPDATE:
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
    def of(cls, attributes: dict[str, Any], first: int, encoding: int, dim: int) -> "Rows":
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
        bound = rounding * np.abs(sums) + (ids.size + 2) * 2.0**-23 * sizes
        wrong = np.abs(found.astype(np.float64) - sums) > bound
    known = sizes < 1e30  # what float32 holds, NaNs left out
    assert not (wrong & known).any(), f"wrong sums: {call}"
    assert not found[(sizes == 0).all(1)].any(), f"no id is no zeros: {call}"


def _numbers(rng: np.random.Generator, shape: Any, dtype: Any) -> np.ndarray:
    """Returns positive numbers that a bfloat16 holds."""
    return rng.uniform(0.25, 1, shape).astype(BFLOAT16).astype(dtype)


def _indices(rng: np.random.Generator, count: int, end: int) -> np.ndarray:
    """Returns int32 numbers below `end`, some of them out of range."""
    found = rng.integers(0, max(end, 1), count)
    wild = rng.choice((*WILD, end), count)
    return np.where(rng.random(count) < 0.1, wild, found).astype(np.int32)


def _packed(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Returns lines of a layout, where what stands in no row is noise."""
    words = rng.integers(0, 2**32, layout.shapes[0].shape, np.uint32).reshape(-1)
    told = cpu.packed_places(layout)
    for first, encoding in zip(told["first"], told["encodings"], strict=True):
        rows = Rows.of(told, int(first), int(encoding), layout.dim)
        words = rows.written(words, _numbers(rng, rows.where.shape, np.float32))
    return words.view(np.int32).reshape(layout.shapes[0].shape)


def good_update(draw: Draw) -> Call:
    """Returns an update as the package makes it."""
    rule = draw(st.sampled_from(RULES))
    num_rows, dim = draw(st.sampled_from(ROWS)), draw(st.sampled_from(WIDTHS))
    count = draw(st.sampled_from(COUNTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    per_row = (False, *(slot.per == "row" for slot in rule.slots))
    kinds = (np.dtype(np.float32), BFLOAT16)
    dtypes = tuple(kinds[0] if x else draw(st.sampled_from(kinds)) for x in per_row)
    if not any(per_row) and draw(st.booleans()):
        layout = PackedLayout(num_rows, dim, dtypes)
        state, where = [_packed(rng, layout)], cpu.packed_places(layout)
    else:
        shapes = [(num_rows,) if x else (num_rows, dim) for x in per_row]
        state = [_numbers(rng, *x) for x in zip(shapes, dtypes, strict=True)]
        where = cpu.plain_places(num_rows, dim, dtypes, per_row)
    num_grads = draw(st.sampled_from((count, count // 2, 5)))
    grads = (2 * rng.integers(-8, 8, (num_grads, dim)) + 1) / 16
    weighted, stochastic = draw(st.booleans()), draw(st.booleans())
    operands = {
        "grads": grads.astype(draw(st.sampled_from(kinds))),
        "ids": _indices(rng, count, num_rows),
        "sources": _indices(rng, count, num_grads),
        "gains": rng.choice([-1.5, 0.5], count * weighted).astype(np.float32),
        "numbers": np.array([0.01, 0.25, 0.5, 5][: 3 + draw(st.booleans())], np.float32),
        "seeds": rng.integers(-9, 9, len(per_row) * stochastic, np.int32),
    }
    limits = Limits(weight_max=draw(st.sampled_from((None, 0.5))))
    flags = ("lazy", "accumulate", "decays", "scales")
    attributes = where | cpu.rule_attributes(rule, limits)
    attributes |= {name: draw(st.booleans()) for name in flags}
    operands |= {f"state_{i}": x for i, x in enumerate(state)}
    return Call(library.UPDATE, operands, attributes)


def good_lookup(draw: Draw) -> Call:
    """Returns a lookup, of rows or of samples, as the package makes it."""
    num_rows, dim = draw(st.sampled_from(ROWS)), draw(st.sampled_from(WIDTHS))
    count = draw(st.sampled_from(COUNTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kinds = (np.dtype(np.float32), BFLOAT16)
    dtypes = tuple(draw(st.sampled_from(kinds)) for _ in range(3))
    layout: Layout = PlainLayout(num_rows, dim, dtypes[:1], (False,))
    if draw(st.booleans()):
        layout = PackedLayout(num_rows, dim, dtypes)
        table = _packed(rng, layout)
    else:
        table = _numbers(rng, (num_rows, dim), dtypes[0])
    result = draw(st.sampled_from((kinds[0], dtypes[0])))
    operands = {"stored": table, "ids": _indices(rng, count, num_rows)}
    where = places.weights_places(layout)
    if draw(st.booleans()):
        return Call(library.LOOKUP, operands, where, ((count, dim), result))
    padded, weighted, scaled = (draw(st.booleans()) for _ in range(3))
    divisors = [x for x in (1, 7, 300) if count % x == 0] if padded else [0, 2, 9, 400]
    num_samples = draw(st.sampled_from(divisors))
    samples = _indices(rng, count * (not padded), num_samples)
    if draw(st.booleans()):
        samples = np.sort(samples.view(np.uint32)).view(np.int32)
    operands |= {
        "samples": samples,
        "gains": _numbers(rng, count * weighted, np.float32),
        "scales": _numbers(rng, num_samples * scaled, np.float32),
    }
    return Call(library.COMBINE, operands, where, ((num_samples, dim), result))


SCALARS = (-(2**31), -1, 0, 1, 2, 3, 8, 127, 2**31 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 2.0)
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool")
NAMES = ("AdamRule", "SGDRule", "RowWiseAdagradRule", "", "Adam", "AdamRule ")


def _other_scalar(draw: Draw, value: Any) -> Any:
    """Returns a number, a flag or a name that may be wrong."""
    if isinstance(value, str):
        return draw(st.sampled_from(NAMES))
    if isinstance(value, bool | np.bool_):
        return not value
    if isinstance(value, np.floating):
        return np.float32(draw(st.sampled_from(FLOATS)))
    near = (max(int(value) - 1, -1), min(int(value) + 1, 2**31 - 1))
    return np.int32(draw(st.sampled_from((*near, *SCALARS))))


def _other_value(draw: Draw, value: Any) -> Any:
    """Returns an attribute that may be wrong."""
    if not isinstance(value, np.ndarray):
        how = draw(st.sampled_from(("other", "other", "wide", "name")))
        if how == "other" or isinstance(value, str):
            return _other_scalar(draw, value)
        return "one" if how == "name" else np.asarray(value).astype(np.float64)[()]
    how = draw(st.sampled_from(("item", "item", "fewer", "more", "none", "wide")))
    if how == "item" and value.size:
        new, i = value.copy(), draw(st.integers(0, value.size - 1))
        new[i] = _other_scalar(draw, value[i])
        return new
    sizes = {"fewer": max(value.size - 1, 0), "none": 0}
    if how == "wide":
        return value.astype(np.int64 if value.dtype == np.int32 else np.float64)
    more = draw(st.sampled_from((value.size + 1, 9)))
    return np.resize(value, sizes.get(how, more)).astype(value.dtype)


def _other_attribute(draw: Draw, call: Call) -> Call:
    name = draw(st.sampled_from((*call.attributes, "another")))
    told = dict(call.attributes)
    if name == "another":
        told[name] = np.int32(1)
    elif draw(st.integers(0, 9)) == 9:
        del told[name]
    else:
        told[name] = _other_value(draw, told[name])
    return dataclasses.replace(call, attributes=told)


def _other_shape(draw: Draw, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape with an axis more or less, or one of another size."""
    axis = draw(st.integers(0, len(shape) - 1)) if shape else 0
    size = shape[axis] if shape else 1
    others = {
        "smaller": (max(size - 1, 0),),
        "larger": (size + 1,),
        "none": (0,),
        "split": (1, size),
        "gone": (),
    }
    new = others[draw(st.sampled_from(list(others)))]
    return (*shape[:axis], *new, *shape[axis + 1 :])


def _other_operand(draw: Draw, call: Call) -> Call:
    """Returns a call with an array of another shape or dtype, or one more or less."""
    name = draw(st.sampled_from(list(call.operands)))
    how = draw(st.sampled_from(("shape", "shape", "shape", "dtype", "gone", "more")))
    x = call.operands[name]
    if how == "gone":
        rest = {other: y for other, y in call.operands.items() if other != name}
        return dataclasses.replace(call, operands=rest)
    if how == "more":
        return call.but(state_more=x)
    if how == "dtype":
        return call.but(**{name: x.astype(draw(st.sampled_from(DTYPES)))})
    return call.but(**{name: np.resize(x, _other_shape(draw, x.shape))})


def _other_result(draw: Draw, call: Call) -> Call:
    """Returns a call whose results are of another shape or dtype, or elsewhere."""
    if call.target == library.UPDATE:
        return dataclasses.replace(call, in_place=False)
    shape, dtype = call.result
    if draw(st.booleans()):
        return dataclasses.replace(call, result=(_other_shape(draw, shape), dtype))
    return dataclasses.replace(call, result=(shape, draw(st.sampled_from(DTYPES))))


FAULTS: tuple[Callable[[Draw, Call], Call], ...] = (
    _other_attribute,
    _other_attribute,
    _other_operand,
    _other_result,
)


def drawn(draw: Draw) -> Call:
    """Returns any call, with up to three faults."""
    good = draw(st.sampled_from((good_update, good_lookup)))
    call = good(draw)
    for _ in range(draw(st.integers(0, 3))):
        fault = draw(st.sampled_from(FAULTS))
        call = fault(draw, call)
        names = (*call.faults, fault.__name__)
        call = dataclasses.replace(call, faults=names)
    return call
