"""Drawn calls of the C++ library: as the package would make them, then spoilt."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparse_adam.kernels import cpu
from sparse_adam.kernels.cpu import library, places
from sparse_adam.kernels.layout import Layout, PackedLayout, PlainLayout
from sparse_adam.rules import Limits
from tests.kernels.cpu.calls import BFLOAT16, Call, Rows
from tests.rules.pairs import PAIRS

Rng = np.random.Generator
RULES = tuple(p.rule for p in PAIRS if cpu.unsupported_rule(p.rule) is None)
ROWS, WIDTHS, COUNTS = (1, 2, 7, 40), (1, 3, 16, 17, 32, 100, 128, 300), (0, 1, 7, 300)
WILD = (-1, -(2**31), 2**31 - 1)
# What attributes and arrays are spoilt with.
SCALARS = (-(2**31), -1, 0, 1, 2, 3, 8, 127, 2**31 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 2.0)
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint32", "bool")
NAMES = ("AdamRule", "SGDRule", "RowWiseAdagradRule", "", "Adam", "AdamRule ")


def _one(rng: Rng, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def _flag(rng: Rng) -> bool:
    return bool(rng.random() < 0.5)


def _numbers(rng: Rng, shape: Any, dtype: Any) -> np.ndarray:
    """Returns positive numbers that a bfloat16 holds."""
    return rng.uniform(0.25, 1, shape).astype(BFLOAT16).astype(dtype)


def _indices(rng: Rng, count: int, end: int) -> np.ndarray:
    """Returns int32 numbers below `end`, some of them out of range."""
    found = rng.integers(0, max(end, 1), count)
    wild = rng.choice((*WILD, end), count)
    return np.where(rng.random(count) < 0.1, wild, found).astype(np.int32)


def _packed(rng: Rng, layout: Layout) -> np.ndarray:
    """Returns lines of a layout, where what stands in no row is noise."""
    words = rng.integers(0, 2**32, layout.shapes[0].shape, np.uint32).reshape(-1)
    told = cpu.packed_places(layout)
    for first, encoding in zip(told["first"], told["encodings"], strict=True):
        rows = Rows.of(told, int(first), int(encoding), layout.dim)
        words = rows.written(words, _numbers(rng, rows.where.shape, np.float32))
    return words.view(np.int32).reshape(layout.shapes[0].shape)


def good_update(rng: Rng) -> Call:
    """Returns an update as the package makes it."""
    rule = _one(rng, RULES)
    num_rows, dim = _one(rng, ROWS), _one(rng, WIDTHS)
    count = _one(rng, COUNTS)
    per_row = (False, *(slot.per == "row" for slot in rule.slots))
    kinds = (np.dtype(np.float32), BFLOAT16)
    dtypes = tuple(kinds[0] if x else _one(rng, kinds) for x in per_row)
    if not any(per_row) and _flag(rng):
        layout = PackedLayout(num_rows, dim, dtypes)
        state, where = [_packed(rng, layout)], cpu.packed_places(layout)
    else:
        shapes = [(num_rows,) if x else (num_rows, dim) for x in per_row]
        state = [_numbers(rng, *x) for x in zip(shapes, dtypes, strict=True)]
        where = cpu.plain_places(num_rows, dim, dtypes, per_row)
    num_grads = _one(rng, (count, count // 2, 5))
    grads = (2 * rng.integers(-8, 8, (num_grads, dim)) + 1) / 16
    weighted, stochastic = _flag(rng), _flag(rng)
    operands = {
        "grads": grads.astype(_one(rng, kinds)),
        "ids": _indices(rng, count, num_rows),
        "sources": _indices(rng, count, num_grads),
        "gains": rng.choice([-1.5, 0.5], count * weighted).astype(np.float32),
        "numbers": np.array([0.01, 0.25, 0.5, 5][: 3 + _flag(rng)], np.float32),
        "seeds": rng.integers(-9, 9, len(per_row) * stochastic, np.int32),
    }
    limits = Limits(weight_max=_one(rng, (None, 0.5)))
    flags = ("lazy", "accumulate", "decays", "scales")
    attributes = where | cpu.rule_attributes(rule, limits)
    attributes |= {name: _flag(rng) for name in flags}
    operands |= {f"state_{i}": x for i, x in enumerate(state)}
    return Call(library.UPDATE, operands, attributes)


def good_lookup(rng: Rng) -> Call:
    """Returns a lookup, of rows or of samples, as the package makes it."""
    num_rows, dim = _one(rng, ROWS), _one(rng, WIDTHS)
    count = _one(rng, COUNTS)
    kinds = (np.dtype(np.float32), BFLOAT16)
    dtypes = tuple(_one(rng, kinds) for _ in range(3))
    layout: Layout = PlainLayout(num_rows, dim, dtypes[:1], (False,))
    if _flag(rng):
        layout = PackedLayout(num_rows, dim, dtypes)
        table = _packed(rng, layout)
    else:
        table = _numbers(rng, (num_rows, dim), dtypes[0])
    result = _one(rng, (kinds[0], dtypes[0]))
    operands = {"stored": table, "ids": _indices(rng, count, num_rows)}
    where = places.weights_places(layout)
    if _flag(rng):
        return Call(library.LOOKUP, operands, where, ((count, dim), result))
    padded, weighted, scaled = (_flag(rng) for _ in range(3))
    divisors = [x for x in (1, 7, 300) if count % x == 0] if padded else [0, 2, 9, 400]
    num_samples = _one(rng, divisors)
    samples = _indices(rng, count * (not padded), num_samples)
    if _flag(rng):
        samples = np.sort(samples.view(np.uint32)).view(np.int32)
    operands |= {
        "samples": samples,
        "gains": _numbers(rng, count * weighted, np.float32),
        "scales": _numbers(rng, num_samples * scaled, np.float32),
    }
    return Call(library.COMBINE, operands, where, ((num_samples, dim), result))


def _other_scalar(rng: Rng, value: Any) -> Any:
    """Returns a number, a flag or a name that may be wrong."""
    if isinstance(value, str):
        return _one(rng, NAMES)
    if isinstance(value, bool | np.bool_):
        return not value
    if isinstance(value, np.floating):
        return np.float32(_one(rng, FLOATS))
    near = (max(int(value) - 1, -1), min(int(value) + 1, 2**31 - 1))
    return np.int32(_one(rng, (*near, *SCALARS)))


def _other_value(rng: Rng, value: Any) -> Any:
    """Returns an attribute that may be wrong."""
    if not isinstance(value, np.ndarray):
        how = _one(rng, ("other", "other", "wide", "name"))
        if how == "other" or isinstance(value, str):
            return _other_scalar(rng, value)
        return "one" if how == "name" else np.asarray(value).astype(np.float64)[()]
    how = _one(rng, ("item", "item", "fewer", "more", "none", "wide"))
    if how == "item" and value.size:
        new, i = value.copy(), int(rng.integers(value.size))
        new[i] = _other_scalar(rng, value[i])
        return new
    if how == "wide":
        return value.astype(np.int64 if value.dtype == np.int32 else np.float64)
    more = _one(rng, (value.size + 1, 9))  # of no items none can be another
    sizes = {"fewer": max(value.size - 1, 0), "none": 0, "more": more, "item": more}
    return np.resize(value, sizes[how]).astype(value.dtype)


def _other_attribute(rng: Rng, call: Call) -> Call:
    name = _one(rng, (*call.attributes, "another"))
    told = dict(call.attributes)
    if name == "another":
        told[name] = np.int32(1)
    elif rng.random() < 0.1:
        del told[name]
    else:
        told[name] = _other_value(rng, told[name])
    return dataclasses.replace(call, attributes=told)


def _other_shape(rng: Rng, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape with an axis more or less, or one of another size."""
    axis = int(rng.integers(len(shape))) if shape else 0
    size = shape[axis] if shape else 1
    others = {
        "smaller": (max(size - 1, 0),),
        "larger": (size + 1,),
        "none": (0,),
        "split": (1, size),
        "gone": (),
    }
    new = others[_one(rng, list(others))]
    return (*shape[:axis], *new, *shape[axis + 1 :])


def _other_operand(rng: Rng, call: Call) -> Call:
    """Returns a call with an array of another shape or dtype, or one more or less."""
    name = _one(rng, list(call.operands))
    how = _one(rng, ("shape", "shape", "shape", "dtype", "gone", "more"))
    x = call.operands[name]
    if how == "gone":
        rest = {other: y for other, y in call.operands.items() if other != name}
        return dataclasses.replace(call, operands=rest)
    if how == "more":
        return call.but(state_more=x)
    if how == "dtype":
        return call.but(**{name: x.astype(_one(rng, DTYPES))})
    return call.but(**{name: np.resize(x, _other_shape(rng, x.shape))})


def _other_result(rng: Rng, call: Call) -> Call:
    """Returns a call whose results are of another shape or dtype, or elsewhere."""
    if call.target == library.UPDATE:
        return dataclasses.replace(call, in_place=False)
    shape, dtype = call.result
    if _flag(rng):
        return dataclasses.replace(call, result=(_other_shape(rng, shape), dtype))
    return dataclasses.replace(call, result=(shape, _one(rng, DTYPES)))


FAULTS: tuple[Callable[[Rng, Call], Call], ...] = (
    _other_attribute,
    _other_attribute,
    _other_operand,
    _other_result,
)


def drawn(seed: int) -> Call:
    """Returns the call of a seed, with up to three faults."""
    rng = np.random.default_rng(seed)
    call = _one(rng, (good_update, good_lookup))(rng)
    for _ in range(rng.integers(4)):
        fault = _one(rng, FAULTS)
        call = fault(rng, call)
        names = (*call.faults, fault.__name__)
        call = dataclasses.replace(call, faults=names)
    return call
