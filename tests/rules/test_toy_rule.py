"""The rule that docs/rules.md writes runs on every implementation, in both storages."""

import doctest
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, sparse_update
from sparse_adam._types import ImplementationName
from sparse_adam.ops import dispatch
from sparse_adam.rules import initial_slots

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
NAME = "RMSPropRule"
DECAY, EPSILON, RATE = np.float32(0.75), np.float32(1e-3), np.float32(0.25)
ROWS, STEPS = 40, 3
# The C++ kernel has loops for the rules of the package only.
IMPLEMENTATIONS = [name for name in dispatch.NAMES if name != "cpu"]


def rule_of_the_page() -> Any:
    """Returns the class that the page defines, made by running the page's own text."""
    names: dict[str, Any] = {"__name__": __name__}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        is_class = f"class {NAME}" in example.source
        if is_class or example.source.startswith(("import ", "from ")):
            exec(compile(example.source, PAGE.name, "exec"), names)
        if is_class:
            return names[NAME]
    raise AssertionError(f"{PAGE.name} defines no {NAME}")


def expected(
    table: np.ndarray, squares: np.ndarray, ids: np.ndarray, grads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The formula, in NumPy and float64, row by row."""
    table, squares = table.astype(np.float64), squares.astype(np.float64)
    for row in set(ids.tolist()) & set(range(ROWS)):
        gradient = grads[ids == row].astype(np.float64).sum(axis=0)
        squares[row] = DECAY * squares[row] + (1 - DECAY) * gradient**2
        table[row] -= RATE * gradient / np.sqrt(squares[row] + EPSILON)
    return table, squares


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("storage", "dim"), [("plain", 128), ("packed", 32)])
def test_runs_on_every_implementation(
    implementation: ImplementationName, storage: str, dim: int
) -> None:
    rule = rule_of_the_page()(decay=float(DECAY), epsilon=float(EPSILON))
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, dim)).astype(np.float32)
    plain = (jnp.asarray(table), *initial_slots(rule, (ROWS, dim), np.float32))
    state: Any = PackedTable.pack(*plain) if storage == "packed" else plain
    now = np.asarray(plain[0]), np.asarray(plain[1])
    untouched = np.ones(ROWS, bool)
    for _ in range(STEPS):
        ids = rng.integers(-2, ROWS // 2, 24)  # equal ones, and padding
        grads = rng.standard_normal((24, dim)).astype(np.float32)
        untouched[ids[ids >= 0]] = False
        state = sparse_update(
            state, ids, grads, rule, learning_rate=RATE, implementation=implementation
        )
        now = expected(*now, ids, grads)
    new = state.unpack() if isinstance(state, PackedTable) else state
    for got, exact, old in zip(new, now, plain, strict=True):
        np.testing.assert_allclose(np.asarray(got), exact, rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(got[untouched], old[untouched])
    assert not np.array_equal(new[0], table)


def test_the_cpu_kernel_says_that_it_has_no_loop() -> None:
    rule = rule_of_the_page()()
    table = jnp.ones((8, 4))
    state = (table, *initial_slots(rule, (8, 4), np.float32))
    with pytest.raises(ValueError, match="implementation='cpu' cannot run this update"):
        sparse_update(
            state,
            jnp.array([1]),
            jnp.ones((1, 4)),
            rule,
            learning_rate=0.1,
            implementation="cpu",
        )
