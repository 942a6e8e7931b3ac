"""Random cases, drawn by groups that share one compiled program.

To compile takes seconds and to run takes milliseconds. So a seed draws a group: an
implementation, storage, rule, options, dtypes and sizes, which make one program, and
many draws of its numbers: ids, gradients, states and counts of steps.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax
import numpy as np

from sparse_adam._types import ImplementationName
from sparse_adam.check.case import Case, Ids
from sparse_adam.check.cases import BFLOAT16, MIXED, left_out
from sparse_adam.check.shrink import FLOAT32
from sparse_adam.ops import dispatch
from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    RowWiseAdagradRule,
    SGDRule,
    UpdateRule,
)

# How many cases share a program, and how often a group is of such an implementation.
COMPILED, INTERPRETED = 150, 20
INTERPRETED_SHARE, LOOKUPS, SPREAD = 0.1, 0.08, 0.25

IDS: tuple[Ids, ...] = get_args(Ids)
STEPS = (1, 1, 2, 3, 8)
ROWS, COUNTS = (1, 2, 7, 40, 64, 130), (1, 2, 7, 16, 40, 130, 300)
WIDTHS = (1, 3, 8, 16, 24, 32, 64, 100, 128, 160, 256)
# An interpreted kernel takes seconds for each shape.
FEW_ROWS, FEW_COUNTS, FEW_WIDTHS = (8, 40), (9, 24), (8, 32, 128, 256)
HALF_GRADS = ("float32", "float32", "bfloat16")
DTYPES = (FLOAT32, FLOAT32, MIXED, BFLOAT16, HALF_GRADS)
CLIPS = (1.5, (-1.5, 2.0), (None, 0.5), (-0.5, None), (0.25, None))


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Cases that differ in their numbers only.

    Attributes:
        seed: that draws them.
        base: what they share.
        size: how many they are.
    """

    seed: int
    base: Case
    size: int

    def cases(self) -> Iterator[Case]:
        """Yields them, the same ones each time."""
        rng = np.random.default_rng((self.seed, 1))
        for _ in range(self.size):
            yield self.base.but(
                ids=_one(rng, IDS),
                steps=1 if self.base.kind == "lookup" else _one(rng, STEPS),
                seed=int(rng.integers(1, 2**31)),
            )


def group(seed: int, only: ImplementationName | None = None) -> Group:
    """Returns the group of a seed, for the devices of this process.

    With `only` it is of this implementation or of the default choice.
    """
    rng = np.random.default_rng((seed, 0))
    compiled, interpreted = (
        [name for name in names if only in (None, name)]
        for names in implementations(jax.default_backend())
    )
    while True:
        if interpreted and rng.random() < INTERPRETED_SHARE:
            case, size = _interpreted(rng, _one(rng, interpreted)), INTERPRETED
        elif rng.random() < LOOKUPS:
            case, size = _lookup(rng), COMPILED
        else:
            case, size = _compiled(rng, _one(rng, (*compiled, None))), COMPILED
        if possible(case):
            return Group(seed, case, size)


def implementations(platform: str) -> tuple[list[str], list[str]]:
    """Returns the names of those that are compiled here, and those interpreted."""
    names: tuple[list[str], list[str]] = ([], [])
    for one in dispatch.IMPLEMENTATIONS:
        if one.compiled_on(platform):
            names[0].append(one.name)
        elif left_out(one, platform) is None:
            names[1].append(one.name)
    return names


def possible(case: Case) -> bool:
    """Whether the package promises to do a case."""
    slots = case.rule.slots
    if case.storage == "packed" and any(slot.per == "row" for slot in slots):
        return False
    return case.objection() is None


def _compiled(
    rng: np.random.Generator, implementation: ImplementationName | None
) -> Case:
    case = Case(
        implementation,
        _one(rng, ("plain", "packed")),
        num_rows=_one(rng, ROWS),
        dim=_one(rng, WIDTHS),
        num_ids=_one(rng, COUNTS),
        dtypes=_one(rng, DTYPES),
        rule=rule(rng),
        weighted=bool(rng.random() < 0.3),
        planned=bool(rng.random() < 0.25),
    )
    return _spread(rng, case.but(options=options(rng, case.dtypes)))


def _interpreted(rng: np.random.Generator, implementation: ImplementationName) -> Case:
    case = Case(
        implementation,
        _one(rng, ("plain", "packed")),
        num_rows=_one(rng, FEW_ROWS),
        dim=_one(rng, FEW_WIDTHS),
        num_ids=_one(rng, FEW_COUNTS),
        dtypes=_one(rng, DTYPES),
        rule=rule(rng),
        weighted=bool(rng.random() < 0.3),
    )
    return case.but(options=options(rng, case.dtypes))


def _lookup(rng: np.random.Generator) -> Case:
    case = Case(
        storage=_one(rng, ("plain", "packed")),
        kind="lookup",
        num_rows=_one(rng, ROWS),
        dim=_one(rng, WIDTHS),
        num_ids=_one(rng, COUNTS),
        dtypes=_one(rng, (FLOAT32, MIXED, BFLOAT16)),
    )
    return _spread(rng, case)


def _spread(rng: np.random.Generator, case: Case) -> Case:
    """Spreads a case over some devices, now and then."""
    numbers = [n for n in (2, 4, 8) if n <= jax.device_count()]
    if not numbers or rng.random() > SPREAD:
        return case
    devices = _one(rng, numbers)
    spread = bool(rng.random() < 0.5) and not case.weighted and not case.planned
    unit = case.but(devices=devices).unit
    rows = unit * -(-case.num_rows // unit)
    count = devices * -(-case.num_ids // devices) if spread else case.num_ids
    return case.but(devices=devices, spread=spread, num_rows=rows, num_ids=count)


def rule(rng: np.random.Generator) -> UpdateRule:
    """Returns a rule with numbers of its own; Adam in one of two draws."""
    if rng.random() < 0.5:
        return AdamRule(
            beta_1=_one(rng, (0.0, 0.8, 0.9)),
            beta_2=_one(rng, (0.0, 0.95, 0.999)),
            epsilon=_one(rng, (1e-7, 0.125)),
            sum_inside_sqrt=_one(rng, (True, False)),
            bias_correction=_one(rng, (None, None, "row")),
        )
    start = _one(rng, (0.1, 0.375))
    rules: tuple[UpdateRule, ...] = (
        SGDRule(),
        AdagradRule(initial_accumulator_value=start),
        AdagradMomentumRule(
            momentum=_one(rng, (0.0, 0.75)),
            use_nesterov=_one(rng, (True, False)),
            exponent=_one(rng, (2.0, 4.0)),
            beta2=_one(rng, (1.0, 0.9)),
            epsilon=0.01,
        ),
        FTRLRule(
            initial_accumulator_value=start,
            l1_regularization_strength=_one(rng, (0.0, 0.125)),
            l2_regularization_strength=_one(rng, (0.0, 0.25)),
            beta=_one(rng, (0.0, 0.5)),
            multiply_linear_by_learning_rate=_one(rng, (True, False)),
        ),
        RowWiseAdagradRule(initial_accumulator_value=start, epsilon=0.125),
    )
    return _one(rng, rules)


def options(
    rng: np.random.Generator, dtypes: tuple[str, str, str]
) -> tuple[tuple[str, Any], ...]:
    """Returns options of `sparse_update` that may stand together."""
    found: dict[str, Any] = {}
    if rng.random() < 0.2:
        found["use_gradient_accumulation"] = False
    else:
        if rng.random() < 0.2:
            found["lazy"] = False
        if rng.random() < 0.3:
            found["clipvalue"] = _one(rng, CLIPS)
    if rng.random() < 0.2:
        found["clip_weight_min"] = -0.75
    if rng.random() < 0.2:
        found["clip_weight_max"] = 1.25
    if rng.random() < 0.3:
        found["weight_decay_factor"] = 0.125
        found["multiply_weight_decay_factor_by_learning_rate"] = _one(
            rng, (True, False)
        )
    if rng.random() < 0.2:
        found["gradient_scale"] = 0.5
    if "bfloat16" in dtypes[:2] and rng.random() < 0.3:
        found["rounding"] = "stochastic"
    return tuple(found.items())


def _one(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]
