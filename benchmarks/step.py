"""`python -m benchmarks step`: whole training steps, timed, or compiled for TPUs."""

from collections.abc import Sequence
from math import isclose
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from benchmarks import lines
from benchmarks.options import (
    RUNS,
    choices_option,
    chosen_out_option,
    require_writable,
    rounds_option,
    timeout_option,
)
from benchmarks.results import Row
from benchmarks.run import Progress, run_cases
from benchmarks.static.chips import CHIPS
from benchmarks.steps import cases as named
from benchmarks.steps.cases import StepCase
from benchmarks.steps.contenders import (
    BATCHES,
    CONTENDERS,
    DEFAULT,
    HOST_ONLY,
    Running,
)
from benchmarks.steps.model import Model, draw_batch
from benchmarks.timing import (
    Turns,
    require_cpu,
    time_beside_ours,
    wall_clock,
)

ROUNDS, QUICK_ROUNDS = 12, 3
LOSSES = 1e-3  # by which the losses of two contenders may differ, relatively
LEGEND = (
    "ms is the median of whole steps that took turns with those of all others; x ours "
    "is the median of the ratios within a round, with bounds that hold it nine times "
    "in ten. compile is in seconds, and in no time. The first losses of all contenders "
    "agree."
)


@click.command()
@click.option(
    "--case",
    "names",
    multiple=True,
    help=f"{', '.join(case.name for case in named.TIMED)}; with --static "
    f"{', '.join(case.name for case in named.COMPILED)}; again for more. Default: all.",
)
@choices_option(
    *("--impl", "impls", CONTENDERS, "A contender"), otherwise=", ".join(DEFAULT)
)
@click.option("--cap", type=click.IntRange(1), help="The most rows of a table.")
@click.option("--dim", type=click.IntRange(1), help="D, the width of a row.")
@click.option("--batch", type=click.IntRange(1), help="Samples of a batch.")
@click.option("--quick", is_flag=True, help="Small models and few rounds.")
@rounds_option("Timed steps of each contender in a case.")
@click.option(
    "--static",
    is_flag=True,
    help="Compile our step for TPUs, and sum what its stages issue; time nothing.",
)
@choices_option(
    *("--chip", "chips", CHIPS, "With --static: a TPU"),
    otherwise="all, v6e with --quick",
)
@timeout_option(600.0, "With --static: seconds for one compile.")
@click.option(
    "--keep",
    is_flag=True,
    help="With --static: keep other records that the result file has.",
)
@chosen_out_option("step.json, or step_static.json there")
def step(
    names: tuple[str, ...],
    impls: tuple[str, ...],
    cap: int | None,
    dim: int | None,
    batch: int | None,
    quick: bool,
    rounds: int | None,
    static: bool,
    chips: tuple[str, ...],
    timeout: float,
    keep: bool,
    out: Path | None,
) -> None:
    """Time whole training steps, or with --static sum their stages for TPUs.

    The models are DLRM-v2, two towers and word2vec: lookup, loss, gradients, and the
    update of tables and dense weights. Ours goes by the embedding API; beside it are
    the same model in JAX without us, and in torch. With --static each model is compiled
    for TPUs that need not be there, and what plan, lookup, combine, update and dense
    part issue and move is added up: bounds, not timings.
    """
    for flag, given in (("--chip", chips), ("--keep", keep)):
        if given and not static:
            raise click.UsageError(f"{flag} goes with --static only")
    out = require_writable(
        out or RUNS / ("step_static.json" if static else "step.json")
    )
    chosen = [
        case.sized(cap=cap, dim=dim, batch=batch)
        for case in _choose(names, static=static, quick=quick)
    ]
    if static:
        from benchmarks.steps import summing

        chips = chips or (("v6e",) if quick else tuple(CHIPS))
        summing.run(chosen, chips, timeout, out, keep=keep)
        return
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    run_cases(
        *("step", [(case, impls or DEFAULT) for case in chosen], rounds, out),
        measure=lambda case, impls, progress: measure(case, impls, rounds, progress),
        show=_print,
        legend=LEGEND,
    )


def _choose(names: Sequence[str], *, static: bool, quick: bool) -> list[StepCase]:
    every = named.COMPILED if static else named.TIMED
    brief = named.COMPILED_QUICK if static else named.QUICK
    if not names:
        return list(brief if quick else every)
    more = () if static else named.STORED
    known = {case.name: case for case in (*every, *brief, *more)}
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--case"
            )
    return [known[name] for name in names]


def measure(
    case: StepCase,
    impls: Sequence[str],
    rounds: int,
    progress: Progress = lambda doing: None,
) -> list[Row]:
    """Returns a row for each contender, timed or with the reason why it is not."""
    model = case.model()
    right: list[float] = []

    def start(impl: str) -> Turns:
        if impl in HOST_ONLY:
            require_cpu()
        running = CONTENDERS[impl][1](model)
        losses, seconds = _first_losses(running)
        right.extend(losses if not right else ())
        _compare(losses, right)
        return Turns.of(running, seconds, rounds)

    titles = {impl: CONTENDERS[impl][0] for impl in impls}
    return time_beside_ours(
        *(_blank(case, model), titles, start, rounds),
        lambda doing: progress(f"{case.name}: {doing}"),
    )


def _first_losses(running: Running) -> tuple[list[float], float]:
    """Makes two steps; returns their losses, and the seconds of the second one.

    After the first one all contenders still have the same weights: dense Adam differs
    from the lazy one where momenta are not zero.
    """
    losses: list[float] = []
    seconds = 0.0
    for turn in range(2):
        call = running.step(turn)
        seconds = wall_clock(lambda: losses.append(call()))  # noqa: B023
    return losses, seconds


def _compare(losses: Sequence[float], right: Sequence[float]) -> None:
    for at, (loss, expected) in enumerate(zip(losses, right, strict=True)):
        if not isclose(loss, expected, rel_tol=LOSSES):
            raise ValueError(
                f"loss {at} is {loss:.6g}, and {expected:.6g} of the first contender"
            )


def _blank(case: StepCase, model: Model) -> Row:
    return Row(
        case=case.name,
        rows=model.num_rows,
        dim=case.dim,
        ids=model.num_ids,
        distribution="log_uniform",
        dtypes=("float32",) * 4,
        options={
            "title": case.title,
            "tables": len(model.tables),
            "cap": case.cap,
            "batch": case.batch,
        },
        impl="",
        title="",
        unique=float(np.mean([_distinct(model, seed) for seed in range(BATCHES)])),
    )


def _distinct(model: Model, seed: int) -> int:
    """Counts the rows that a batch names."""
    of: dict[str, list[np.ndarray]] = {name: [] for name in model.tables}
    for name, ids in draw_batch(model, seed).ids.items():
        of[model.features[name].table].append(ids.reshape(-1))
    return sum(np.unique(np.concatenate(ids)).size for ids in of.values())


def _print(console: Console, case: StepCase, found: Sequence[Row]) -> None:
    head = found[0]
    title = (
        f"{case.name}: {case.title}, {head.options['tables']} tables, V = "
        f"{head.rows:,} in all, D = {head.dim}, B = {case.batch:,}, {head.ids:,} "
        f"ids of {head.unique:,.0f} rows"
    )
    lines.ratios(console, title, found)
