"""Making a failing case smaller, and finding what avoids it."""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax

from sparse_adam.check.case import Case, call_of
from sparse_adam.check.run import Outcome, run
from sparse_adam.kernels import sparsecore, sweep, tensorcore
from sparse_adam.kernels.avoided import KERNELS, avoiding
from sparse_adam.kernels.tiles import LANES
from sparse_adam.ops import dispatch
from sparse_adam.rules import AdamRule

FLOAT32 = ("float32", "float32", "float32")


def shrink(failed: Outcome, seconds: float) -> Outcome:
    """Returns the outcome of a smaller case that fails in the same way.

    Tries one simplification after the other and keeps those after which the case still
    fails, until none is left or the time is up.
    """
    deadline = time.monotonic() + seconds
    smallest, progress, seen = failed, True, {failed.case}
    while progress:
        progress = False
        for simpler in simplifications(smallest.case):
            if time.monotonic() > deadline:
                return smallest
            if simpler in seen:
                continue
            seen.add(simpler)
            tried = run(simpler)
            if tried.status == failed.status:
                smallest, progress = tried, True
                break
    return smallest


def simplifications(case: Case) -> Iterator[Case]:
    """Yields cases that are a little simpler, those that simplify most first."""
    if case.steps > 1:
        yield case.but(steps=1)
    if case.devices > 1:
        yield case.but(devices=1, spread=False)
    if case.kind == "update":
        yield from _simpler_calls(case)
    if case.kind == "mean":  # a mean needs many numbers, and every row in the batch
        yield from _smaller(case, "dim")
        return
    for kind in ("distinct", "hot"):
        if case.ids not in ("distinct", kind):
            yield case.but(ids=kind)
    for name in ("num_ids", "num_rows", "dim"):
        yield from _smaller(case, name)


def _simpler_calls(case: Case) -> Iterator[Case]:
    plain = case.but(options=(), rule=AdamRule(), weighted=False, planned=False)
    if plain != case:
        yield plain
    for option in case.options:
        yield case.but(options=tuple(o for o in case.options if o != option))
    if case.rule != AdamRule():
        yield case.but(rule=AdamRule())
    if case.weighted:
        yield case.but(weighted=False)
    if case.planned:
        yield case.but(planned=False)
    if case.spread:
        yield case.but(spread=False)
    if case.dtypes != FLOAT32:
        yield case.but(dtypes=FLOAT32)


def _smaller(case: Case, name: str) -> Iterator[Case]:
    """Yields a case with less of one size: by a factor, then by a half, then by one."""
    size, unit = getattr(case, name), case.devices
    sizes = [1, 2, 3, 8, 16, LANES, size // 2, size - 1]
    if name == "dim":  # each width compiles, and below 8 none is simpler
        sizes, unit = [8, LANES], 1
    elif name == "num_rows":
        unit = case.unit
    for smaller in sorted({s * unit for s in sizes if 0 < s * unit < size}):
        simpler = case.but(**{name: smaller})
        if simpler.num_rows % simpler.unit == 0:
            yield simpler


def ways_around(case: Case) -> list[str]:
    """Returns what avoids a failure: a config, an implementation, one kernel less.

    Each was tried on the very case. Empty where nothing helps.
    """
    found = []
    ways = {"config": other_configs, "implementation": other_implementations}
    if case.kind == "lookup":
        ways = {}
    for name, others in ways.items():
        for other in others(case):
            if run(other).status == "ok":
                value = getattr(other, name)
                said = call_of(value) if name == "config" else repr(value)
                found.append(f"{name}={said}")
                break
    for kernel in KERNELS:
        with avoiding(kernel):
            if run(case).status == "ok":
                found.append(f"sparse_adam.avoid_kernels({kernel!r})")
    return found


def other_configs(case: Case) -> Iterator[Case]:
    """Yields the case with other configs of its kernel, which tell what is at fault.

    First with each of its safe forms alone: the feature that one does without. Then
    with all of them, and last with the smallest blocks that the kernel can be given.
    """
    kinds = {one.name: one.config for one in dispatch.IMPLEMENTATIONS}
    kind = kinds.get(case.implementation or "")
    if kind is None:
        return
    spec = case.spec()
    # Blocks that suit the update; those of SparseCores are left to it.
    of = kind if kind is sparsecore.Config else functools.partial(kind.choose, spec)
    for name, value in kind.SAFE_FORMS.items():
        yield case.but(config=of(**{name: value}))
    if len(kind.SAFE_FORMS) > 1:
        yield case.but(config=of(**kind.SAFE_FORMS))
    smallest = {
        "tensorcore": tensorcore.Config(rows_per_chunk=8, dma_unroll=1),
        "sweep": sweep.Config(16, 16, 1),
        "sparsecore": dataclasses.replace(sparsecore.Config.choose(spec), chunk=16),
    }
    yield case.but(config=smallest[case.implementation or ""])


def other_implementations(case: Case) -> Iterator[Case]:
    """Yields the case on what else is compiled here."""
    for one in dispatch.IMPLEMENTATIONS:
        if one.name != case.implementation and one.compiled_on(jax.default_backend()):
            yield case.but(implementation=one.name, config=None)
