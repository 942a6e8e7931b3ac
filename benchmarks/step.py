"""`python -m benchmarks step`: whole training steps, timed, or compiled for TPUs."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isclose
from pathlib import Path

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from benchmarks import busy, results, statistics
from benchmarks.options import RUNS, WIDTH, require_writable, rounds_option, wrapped
from benchmarks.results import Results, Row
from benchmarks.static.chips import CHIPS
from benchmarks.steps import cases as named
from benchmarks.steps.cases import StepCase
from benchmarks.steps.contenders import BATCHES, CONTENDERS, HOST_ONLY, Running
from benchmarks.steps.model import Model, draw_batch
from benchmarks.timing import FEW, PATIENCE, Turns, take_turns, wall_clock

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
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    help="A contender; again for more. Default: all.",
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
@click.option(
    "--chip",
    "chips",
    multiple=True,
    type=click.Choice(list(CHIPS)),
    help="With --static: a TPU; again for more. Default: all, v6e with --quick.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="With --static: seconds for one compile.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"The result file. Default: {RUNS}/step.json, or step_static.json there.",
)
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
    out: Path | None,
) -> None:
    """Time whole training steps, or with --static sum their stages for TPUs.

    The models are DLRM-v2, two towers and word2vec: lookup, loss, gradients, and the
    update of tables and dense weights. Ours goes by the embedding API; beside it are
    the same model in JAX without us, and in torch. With --static each model is compiled
    for TPUs that need not be there, and what plan, lookup, combine, update and dense
    part issue and move is added up: bounds, not timings.
    """
    if chips and not static:
        raise click.UsageError("--chip goes with --static only")
    out = require_writable(
        out or RUNS / ("step_static.json" if static else "step.json")
    )
    chosen = [
        case.sized(cap=cap, dim=dim, batch=batch)
        for case in _choose(names, static=static, quick=quick)
    ]
    if static:
        from benchmarks.steps import summing

        summing.run(
            chosen, chips or (("v6e",) if quick else tuple(CHIPS)), timeout, out
        )
        return
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    if any(
        row.status == "failed"
        for row in _time_all(chosen, impls or tuple(CONTENDERS), rounds, out)
    ):
        raise SystemExit(1)


def _choose(names: Sequence[str], *, static: bool, quick: bool) -> list[StepCase]:
    every = named.COMPILED if static else named.TIMED
    brief = named.COMPILED_QUICK if static else named.QUICK
    if not names:
        return list(brief if quick else every)
    known = {case.name: case for case in (*every, *brief)}
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(known)}", param_hint="--case"
            )
    return [known[name] for name in names]


def _time_all(
    chosen: Sequence[StepCase], impls: Sequence[str], rounds: int, out: Path
) -> list[Row]:
    """Times the cases, prints their rows, and writes the file after every case."""
    console = Console(highlight=False, soft_wrap=True)
    started, load, before = results.now(), results.load(), busy.read_clock()
    _warn(console, busy.warning(busy.sample(), "before the run"))
    rows: list[Row] = []
    others: float | None = None
    config = {"rounds": rounds, "cases": {case.name: list(impls) for case in chosen}}
    with tqdm(total=len(chosen), leave=False, disable=None, ncols=WIDTH) as bar:
        for case in chosen:
            found = measure(case, impls, rounds, progress=bar.set_description)
            rows += found
            others = busy.cores_of_others(before, busy.read_clock())
            Results(
                "step",
                config,
                tuple(rows),
                machine=results.describe_machine(load, others),
                versions=results.package_versions(),
                commit=results.commit(),
                started=started,
            ).write(out)
            bar.clear()
            _print(console, case, found)
            bar.update()
    console.print(wrapped(LEGEND, 0))
    _warn(console, busy.warning(others, "during the run"))
    console.print(f"Wrote {out}")
    return rows


def measure(
    case: StepCase,
    impls: Sequence[str],
    rounds: int,
    progress: Callable[[str], object] = lambda doing: None,
) -> list[Row]:
    """One row for each contender; whatever goes wrong with it becomes its reason."""
    model = case.model()
    blank = _blank(case, model)
    rows: dict[str, Row] = {}
    entries: dict[str, Turns] = {}
    right: list[float] | None = None
    for impl in impls:
        progress(f"{case.name}: {impl}")
        title, start = CONTENDERS[impl]
        rows[impl] = replace(blank, impl=impl, title=title)
        if impl in HOST_ONLY and jax.default_backend() != "cpu":
            reason = "runs on the CPU, and the tables are elsewhere"
            rows[impl] = replace(rows[impl], status="skipped", reason=reason)
            continue
        try:
            running = start(model)
            losses, slow = _first_losses(running)
            right = right or losses
            _compare(losses, right)
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed"
            rows[impl] = replace(rows[impl], status="skipped", reason=reason)
        except Exception as error:
            rows[impl] = _failed(rows[impl], error)
        else:
            entries[impl] = Turns(running, min(FEW, rounds) if slow else rounds)
    broken = take_turns(
        entries, rounds, progress=lambda doing: progress(f"{case.name}: {doing}")
    )
    for impl, error in broken.items():
        rows[impl] = _failed(rows[impl], error)
        del entries[impl]
    base = entries.get(next(iter(CONTENDERS)))
    for impl, entry in entries.items():
        rows[impl] = _timed(rows[impl], entry, base)
    entries.clear()
    gc.collect()  # the tables of a case, before those of the next
    return list(rows.values())


def _first_losses(running: Running) -> tuple[list[float], bool]:
    """Makes two steps; returns their losses, and whether the second took long.

    After the first one all contenders still have the same weights: dense Adam differs
    from the lazy one where momenta are not zero.
    """
    losses: list[float] = []
    seconds = 0.0
    for turn in range(2):
        call = running.step(turn)
        seconds = wall_clock(lambda: losses.append(call()))  # noqa: B023
    return losses, seconds > PATIENCE


def _compare(losses: Sequence[float], right: Sequence[float]) -> None:
    for at, (loss, expected) in enumerate(zip(losses, right, strict=True)):
        if not isclose(loss, expected, rel_tol=LOSSES):
            raise ValueError(
                f"loss {at} is {loss:.6g}, and {expected:.6g} of the first contender"
            )


def _timed(row: Row, entry: Turns, base: Turns | None) -> Row:
    middle = statistics.spread(entry.times)
    row = replace(
        row,
        compile_s=round(entry.running.compile_seconds, 3),
        ms=tuple(round(1e3 * t, 4) for t in entry.times),
        p20_ms=round(1e3 * middle.p20, 4),
        p50_ms=round(1e3 * middle.p50, 4),
        p80_ms=round(1e3 * middle.p80, 4),
        least_ms=round(1e3 * middle.least, 4),
    )
    if base is None:
        return row
    low, ratio, high = statistics.interval_of_rounds(entry.times, base.times)
    bounds = round(low, 3), round(high, 3)
    return replace(row, ratio=round(ratio, 3), ratio_bounds=bounds)


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


def _failed(row: Row, error: Exception) -> Row:
    words = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {words}"[:300]
    return replace(row, status="failed", reason=reason)


def _print(console: Console, case: StepCase, found: Sequence[Row]) -> None:
    head = found[0]
    console.print(
        wrapped(
            f"{case.name}: {case.title}, {head.options['tables']} tables, V = "
            f"{head.rows:,} in all, D = {head.dim}, B = {case.batch:,}, {head.ids:,} "
            f"ids of {head.unique:,.0f} rows"
        ),
        style="bold",
    )
    columns = ("", "ms", "p20-p80", "compile", "x ours", "bounds")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None)
    for row in found:
        if row.status != "ok":
            console.print(wrapped(f"{row.title} {row.status}: {row.reason}"))
            continue
        cells = [row.title, f"{row.p50_ms:.1f}", f"{row.p20_ms:.1f}-{row.p80_ms:.1f}"]
        cells.append(f"{row.compile_s:.1f}")
        if row.ratio is not None and row.ratio_bounds is not None:
            low, high = row.ratio_bounds
            cells += [f"{row.ratio:.2f}", f"{low:.2f}-{high:.2f}"]
        table.add_row(*cells)
    console.print(table)


def _warn(console: Console, words: str | None) -> None:
    if words is not None:
        console.print(wrapped(words), style="yellow")
