"""Running a case: the call of the package, the reference, and the comparison."""

import dataclasses
import functools
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam import reference
from sparse_adam.check import batches
from sparse_adam.check.batches import Batch
from sparse_adam.check.case import Case
from sparse_adam.check.compare import (
    ROUNDINGS,
    Comparison,
    compare,
    compare_bits,
    compare_mean,
    roundings,
)
from sparse_adam.ops.lookup import lookup
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.plan import plan_update
from sparse_adam.ops.sparse_update import sparse_update
from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    RowWiseAdagradRule,
    SGDRule,
    UpdateRule,
)

RATE = 0.01
_STEPS: dict[type, Any] = {
    AdamRule: reference.adam,
    SGDRule: reference.sgd,
    AdagradRule: reference.adagrad,
    AdagradMomentumRule: reference.adagrad_momentum,
    FTRLRule: reference.ftrl,
    RowWiseAdagradRule: reference.row_wise_adagrad,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: that was run.
        status: "ok"; "wrong", of a result; "raised", of an exception; or "not run".
        comparison: of the worst number.
        text: what is wrong, what was raised, or why it was not run.
        seconds: that it took.
    """

    case: Case
    status: Literal["ok", "wrong", "raised", "not run"]
    comparison: Comparison = Comparison()  # noqa: RUF009 (it is frozen)
    text: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the package is at fault: a wrong result, or an exception.

        A case that was not run, since its implementation cannot do it, is no failure.
        """
        return self.status in ("wrong", "raised")


def run(case: Case) -> Outcome:
    """Runs a case; whatever goes wrong in it is in the outcome."""
    start = time.perf_counter()
    try:
        objection = case.objection()
        if objection is not None:
            return Outcome(case, "not run", text=objection)
        comparison = _compared(case)
    except Exception as error:
        seconds = time.perf_counter() - start
        text = f"{type(error).__name__}: {error}"
        return Outcome(case, "raised", text=text, seconds=seconds)
    seconds = time.perf_counter() - start
    if comparison.fault is not None:
        return Outcome(case, "wrong", comparison, comparison.fault, seconds)
    return Outcome(case, "ok", comparison, seconds=seconds)


def _compared(case: Case) -> Comparison:
    if case.kind == "lookup":
        return _looked_up(case)
    arrays, given = batches.state(case), batches.batch(case, 0)
    if case.kind == "mean":
        arrays, given = batches.mean_case(case)
    state = stored(case, arrays)
    worst = Comparison()
    for step in range(case.steps):
        given = given if step == 0 else batches.batch(case, step)
        # A step begins with what the one before has made, so its bound is its own.
        state = _updated(case, state, given)
        new = _arrays(state)
        found = _compared_step(case, given, arrays, new)
        if found.fault is not None:
            where = f"step {step + 1}: " if case.steps > 1 else ""
            return dataclasses.replace(found, fault=f"{where}{found.fault}")
        worst = max(worst, found, key=lambda one: one.ratio)
        arrays = new
    return worst


def _compared_step(
    case: Case, given: Batch, old: tuple[np.ndarray, ...], new: tuple[np.ndarray, ...]
) -> Comparison:
    options: dict[str, Any] = {**dict(case.options), **given.weights}
    stochastic = options.pop("rounding", None) == "stochastic"
    step = reference_step(case.rule)

    def update(state: Any, grads: Any) -> tuple[np.ndarray, ...]:
        return reference.sparse_update(
            state, given.ids, grads, step, learning_rate=RATE, **options
        )

    before = tuple(x.astype(np.float64) for x in old)
    grads = given.grads.astype(np.float64)
    expected, bounds = roundings(case.rule, update, before, grads, RATE)
    valid = given.ids[(given.ids >= 0) & (given.ids < case.num_rows)]
    counts = np.bincount(valid, minlength=case.num_rows)
    lazy = options.get("lazy", True)
    stepped = counts > 0 if lazy else np.ones(case.num_rows, bool)
    steps = 1
    if not options.get("use_gradient_accumulation", True):
        steps = max(1, int(counts.max()))
    worst = Comparison()
    names = ("table", *(slot.name for slot in case.rule.slots))
    for name, now, was, exact, bound in zip(
        names, new, old, expected, bounds, strict=True
    ):
        if case.kind == "mean":
            found = compare_mean(name, now, exact)
        else:
            allowed = ROUNDINGS * steps * bound
            found = compare(
                name, now, was, exact, allowed, stepped, stochastic=stochastic
            )
        if found.fault is not None:
            return found
        worst = max(worst, found, key=lambda one: one.ratio)
    return worst


def _looked_up(case: Case) -> Comparison:
    arrays, given = batches.state(case), batches.batch(case, 0)
    inside = (given.ids >= 0) & (given.ids < case.num_rows)
    expected = arrays[0][np.where(inside, given.ids, 0)]
    expected[~inside] = 0
    state = stored(case, arrays)
    table = state if case.storage == "packed" else state[0]
    rows = jax.jit(lookup)(table, _placed(case, given.ids))
    return compare_bits("rows", np.array(rows), expected)


def stored(case: Case, arrays: tuple[np.ndarray, ...]) -> Any:
    """Puts a state where the case wants it: `(table, *slots)` or a `PackedTable`."""
    placed = tuple(map(jnp.array, arrays))
    if case.devices > 1:
        placed = tuple(jax.device_put(x, _rows_over(case.devices)) for x in placed)
    return PackedTable.pack(*placed) if case.storage == "packed" else placed


def _updated(case: Case, state: Any, given: Batch) -> Any:
    plan = plan_update(given.ids, case.num_rows) if case.planned else None
    ids, grads = _placed(case, given.ids), _placed(case, given.grads)
    # What differs in numbers only is one program.
    program = _program(case.but(ids="zipf", steps=1, kind="update", seed=0))
    return program(state, ids, grads, given.weights, plan)


@functools.lru_cache(maxsize=64)
def _program(case: Case) -> Any:
    """Returns the compiled update, which takes the state and gives it back."""
    options = case.arguments()

    def update(state: Any, ids: Any, grads: Any, weights: Any, plan: Any) -> Any:
        return sparse_update(
            state,
            ids,
            grads,
            case.rule,
            learning_rate=RATE,
            plan=plan,
            implementation=case.implementation,
            config=case.config,
            **weights,
            **options,
        )

    return jax.jit(update, donate_argnums=0)


def _arrays(state: Any) -> tuple[np.ndarray, ...]:
    """Returns copies: the update of the next step is in place."""
    arrays = state.unpack() if isinstance(state, PackedTable) else state
    return tuple(np.array(x) for x in arrays)


def _placed(case: Case, x: np.ndarray) -> jax.Array:
    if case.spread:
        return jax.device_put(x, _rows_over(case.devices))
    return jnp.asarray(x)


def _rows_over(devices: int) -> NamedSharding:
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def reference_step(rule: UpdateRule) -> Any:
    """Returns the reference's step of one of the package's rules."""
    numbers = {
        field.name: getattr(rule, field.name)
        for field in dataclasses.fields(rule)  # type: ignore[arg-type]
        if field.name != "initial_accumulator_value"
    }
    return _STEPS[type(rule)](**numbers)
