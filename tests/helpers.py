"""Comparisons of updates, and what an implementation can be asked to do."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.rules import AdamRule
from tests.cases import Arrays, Case, State

ULP = 2.0**-23  # of a float32 of about 1


def spec(case: Case, arrays: Arrays, packed: bool = False) -> UpdateSpec:
    """The record that the op makes of a case."""
    options = dict(case.options)
    options["lazy"] = options.pop("lazy_adam", True)
    names = {field.name for field in dataclasses.fields(AdamRule)}
    rule = AdamRule(**{name: options.pop(name) for name in names & set(options)})
    layout = validate.plain_layout(arrays.state, rule)
    if packed:
        layout = PackedLayout(layout.num_rows, layout.dim, layout.dtypes)
    inputs = UpdateInputs(arrays.ids, arrays.grads, **arrays.weights)
    return validate.update_spec(layout, inputs, rule, UpdateOptions(**options))


def changed(
    old: UpdateSpec,
    *,
    num_rows: int | None = None,
    dim: int | None = None,
    dtypes: Any = None,
    packed: bool | None = None,
    **fields: Any,
) -> UpdateSpec:
    """The record of another update: of another size, dtypes or storage, say."""
    layout = old.layout
    shape = (num_rows or layout.num_rows, dim or layout.dim)
    dtypes = tuple(dtypes or layout.dtypes)
    if layout.storage == "packed" if packed is None else packed:
        layout = PackedLayout(*shape, dtypes)
    else:
        layout = PlainLayout(*shape, dtypes, layout.per_row)
    return dataclasses.replace(old, layout=layout, **fields)


def supports(name: str, case: Case, arrays: Arrays, packed: bool = False) -> bool:
    """Whether the implementation `name` says it can do the case."""
    one = dispatch.IMPLEMENTATIONS[dispatch.NAMES.index(name)]
    return one.unsupported(spec(case, arrays, packed)) is None


def as_float32(state: Any) -> State:
    w, m, v = (np.asarray(x).astype(np.float32) for x in state)
    return w, m, v


def assert_close_states(
    new: Any,
    old: Any,
    expected: Any,
    *,
    learning_rate: float = 1e-3,
    beta_2: float = 0.999,
    steps: int = 1,
) -> None:
    """Asserts that one update of (table, momenta, velocities) is right.

    Args:
        new: what the op returned, float32 or bfloat16 each.
        old: what it was given.
        expected: float32, the reference's result for `old` in float32.
        learning_rate: of the update.
        beta_2: of the update.
        steps: the largest number of steps made on one row.

    The bounds are counts of float32 roundings, each half a unit in the last place of a
    magnitude that occurs on the way. m is two products and a sum of |m| at most
    |m_old| + |m_new|; v is a sum of nonnegative terms. The step inherits both, adds
    those of root and quotient, and an error dm of m moves it by lr * dm / sqrt(v).
    """
    names = ("table", "momenta", "velocities")
    w, m, v = old = as_float32(old)
    new_w, new_m, new_v = expected
    size = np.abs(m) + np.abs(new_m)
    if steps > 1:  # 8 is above every gradient of a case, here before it is weighed
        size = size + 8
    root = np.sqrt(np.minimum(new_v, v * np.float32(beta_2) ** steps) + 1e-14)
    if steps == 1:
        root = np.sqrt(new_v + 1e-14)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = np.abs(new_w - w) + np.abs(w) + np.abs(new_w)
        scales = (moved + learning_rate * size / root, size, v + new_v)
    for name, *arrays, scale in zip(names, new, old, expected, scales, strict=True):
        assert_close_steps(*arrays, tolerance=4 * steps * ULP * scale, name=name)


def assert_close_steps(
    new: Any, old: Any, expected: Any, *, tolerance: Any, name: str = "array"
) -> None:
    """Asserts that `new - old` is `expected - old`, within `tolerance`, elementwise.

    `expected` is float32. A bfloat16 `new` must be the rounding of some number within
    the tolerance: half a unit in the last place, and at a tie either neighbour.
    """
    new, old, expected = np.asarray(new), np.asarray(old), np.asarray(expected)
    assert new.shape == expected.shape, f"{name}: {new.shape=}, {expected.shape=}"
    low, high = expected - tolerance, expected + tolerance
    if new.dtype == ml_dtypes.bfloat16:
        low, high = low.astype(new.dtype), high.astype(new.dtype)
    new, old, low, high = (x.astype(np.float64) for x in (new, old, low, high))
    wrong = ~((new >= low) & (new <= high)) & ~(np.isnan(new) & np.isnan(expected))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} steps are wrong, first at {at}: "
            f"{new[at] - old[at]} is not in [{low[at] - old[at]}, "
            f"{high[at] - old[at]}]; old {old[at]}, new {new[at]}"
        )


def assert_bitwise_equal(actual: Any, expected: Any, name: str = "array") -> None:
    """Asserts equal dtypes, shapes and bits: NaNs too, and the sign of zero."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (
        f"{name}: {actual.dtype}{actual.shape}, not {expected.dtype}{expected.shape}"
    )
    words = np.dtype(f"u{actual.dtype.itemsize}")
    a, e = (np.ascontiguousarray(x).view(words) for x in (actual, expected))
    if (a != e).any():
        at = tuple(int(i) for i in np.argwhere(a != e)[0])
        raise AssertionError(
            f"{name}: {(a != e).sum()} of {a.size} differ, first at {at}: "
            f"{actual[at]} ({a[at]:#x}) is not {expected[at]} ({e[at]:#x})"
        )


def assert_states_bitwise_equal(actual: Any, expected: Any) -> None:
    names = ("table", "momenta", "velocities")
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_bitwise_equal(a, e, name)
