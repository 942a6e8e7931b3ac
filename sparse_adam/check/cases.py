"""The cases of a check: which updates to run, on which implementation and storage."""

from collections.abc import Iterator

from sparse_adam.check.case import Case
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

BFLOAT16 = ("bfloat16", "bfloat16", "bfloat16")
MIXED = ("float32", "bfloat16", "bfloat16")
LIMITS = (
    ("clipvalue", (-1.5, 2.0)),
    ("clip_weight_min", -0.75),
    ("clip_weight_max", 1.25),
    ("weight_decay_factor", 0.125),
    ("multiply_weight_decay_factor_by_learning_rate", True),
    ("gradient_scale", 0.5),
)
EACH = (("use_gradient_accumulation", False),)
ALL_ROWS = (("lazy", False), ("clipvalue", (0.25, None)))
OUTSIDE = AdamRule(0.8, 0.95, 0.125, sum_inside_sqrt=False)
WIDTHS = (8, 16, 32, 64, 100, 128, 256, 512, 1024)
RULES: tuple[UpdateRule, ...] = (
    SGDRule(),
    AdagradRule(initial_accumulator_value=0.375),
    AdagradMomentumRule(momentum=0.75, epsilon=0.01),
    FTRLRule(initial_accumulator_value=0.375, l1_regularization_strength=0.125),
    RowWiseAdagradRule(initial_accumulator_value=0.25, epsilon=0.125),
    AdamRule(0.85, 0.9975, 0.0625, bias_correction="row"),
)


def compiled_cases(base: Case, quick: bool) -> Iterator[Case]:
    """Yields the cases of an implementation that is compiled here, in one storage."""
    yield from (base.but(dim=dim) for dim in ((8, 128, 1024) if quick else WIDTHS))
    # These differ from the one of 128 in their numbers only: nothing is compiled.
    for ids in ("hot", "distinct", "padded", "wild", "sorted", "nan"):
        yield base.but(ids=ids)
    yield base.but(steps=4)
    yield base.but(num_rows=64, num_ids=1000, ids="hot")
    yield base.but(rule=OUTSIDE, options=LIMITS, planned=True)
    yield base.but(options=EACH, weighted=True, ids="padded")
    yield base.but(options=ALL_ROWS)
    yield base.but(dtypes=MIXED, dim=32)
    yield base.but(dtypes=BFLOAT16)
    rounding = (("rounding", "stochastic"),)
    mean = base.but(kind="mean", num_rows=64, num_ids=64, ids="distinct")
    yield mean.but(dtypes=BFLOAT16, options=rounding)
    if quick:
        return
    yield base.but(num_ids=1)
    yield base.but(weighted=True)
    yield base.but(weighted=True, dim=16)
    yield base.but(planned=True, ids="wild", dim=256)
    yield base.but(options=LIMITS[:1], dim=64)
    yield base.but(options=EACH, dim=256, ids="hot")
    yield base.but(options=ALL_ROWS, dim=16)
    yield base.but(dtypes=BFLOAT16, dim=8, ids="wild")
    yield base.but(num_rows=1, num_ids=3)
    yield base.but(num_rows=1000, num_ids=700, steps=3)
    for rule in RULES:
        if base.storage == "plain" or all(slot.per == "element" for slot in rule.slots):
            yield base.but(rule=rule)


def interpreted_cases(base: Case, quick: bool) -> Iterator[Case]:
    """Yields the cases of a TPU kernel off a TPU: each takes seconds."""
    tiny = base.but(num_rows=16, num_ids=9, ids="wild")
    if not quick or base.storage == "plain":
        yield tiny
    if not quick:
        yield tiny.but(rule=OUTSIDE, options=LIMITS, ids="hot", steps=2)


def lookup_cases(quick: bool) -> Iterator[Case]:
    """Yields lookups of both storages."""
    for storage in ("plain", "packed"):
        base = Case(storage=storage, kind="lookup", ids="wild")
        yield from (base.but(dim=dim) for dim in ((8, 1024) if quick else WIDTHS))
        yield base.but(dtypes=BFLOAT16)


def spread_cases(devices: int, quick: bool) -> Iterator[Case]:
    """Yields cases of tables whose rows all devices share."""
    for storage in ("plain", "packed"):
        base = Case(storage=storage, devices=devices, num_rows=16 * devices)
        base = base.but(num_ids=8 * devices, ids="wild")
        yield base
        yield base.but(spread=True)
        yield base.but(kind="lookup", spread=True)
        if not quick:
            yield base.but(options=LIMITS, rule=OUTSIDE, steps=2, spread=True)
            yield base.but(dtypes=BFLOAT16, ids="hot")


def left_out(one: dispatch.Implementation, platform: str) -> str | None:
    """Says why no case of an implementation runs on a platform, or returns None."""
    if one.compiled_on(platform):
        return None
    if one.native_to != "tpu":
        why = one.absent() or one.unsupported(Case().spec())
        return why or f"it runs on {one.native_to} only, and this is {platform}"
    return one.unsupported(Case().spec())  # such as a TPU without SparseCores


def all_cases(platform: str, devices: int, quick: bool) -> Iterator[Case]:
    """Yields every case for a machine; those that cannot run there say so later."""
    for one in dispatch.IMPLEMENTATIONS:
        make = compiled_cases
        if not one.compiled_on(platform):
            make = interpreted_cases
            if left_out(one, platform) is not None:
                continue
        for storage in ("plain", "packed"):
            yield from make(Case(one.name, storage), quick)
    for storage in ("plain", "packed"):
        yield Case(None, storage)
        yield Case(None, storage, dim=16, num_rows=1000, ids="wild", steps=2)
    yield from lookup_cases(quick)
    if devices > 1:
        yield from spread_cases(devices, quick)
