"""Times contenders in turn, so that a slow moment of the machine hits all of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax

from benchmarks import statistics
from benchmarks.cases import Case
from benchmarks.check import check
from benchmarks.contenders import COPY, OURS, Contender
from benchmarks.results import Row
from benchmarks.workload import Workload

REST = 0.02  # seconds in which the threads of the one before cease to spin
PATIENCE = 0.3  # seconds of a call; who takes longer is given few rounds
FEW = 3
Clock = Callable[[Callable[[], object]], float]  # makes a call; its seconds


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds until the call returns."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Steps(Protocol):
    """Anything that has a call for each turn."""

    compile_seconds: float

    def step(self, turn: int) -> Callable[[], object]:
        """Gets ready for the turn; what it returns is timed."""
        ...


@dataclass
class Turns:
    """Something that takes turns, and the times of its calls."""

    running: Steps
    rounds: int
    times: list[float] = field(default_factory=list)


@dataclass
class Entry(Turns):
    """A contender at work in a case."""

    contender: Contender = field(kw_only=True)


def measure(
    case: Case,
    contenders: Sequence[Contender],
    rounds: int,
    *,
    clock: Clock = wall_clock,
    rest: float = REST,
    progress: Callable[[str], object] = lambda doing: None,
) -> list[Row]:
    """One row for each contender; whatever goes wrong with it becomes its reason."""
    workload = Workload.of(case)
    entries: dict[str, Entry] = {}
    rows: dict[str, Row] = {}
    for contender in contenders:
        progress(f"{case.name}: {contender.name}")
        blank = _blank(workload, contender)
        try:
            reason = _objection(contender, case)
            if reason is not None:
                rows[contender.name] = replace(blank, status="skipped", reason=reason)
                continue
            running = contender.start(workload)
            check(contender, running, workload)
            slow = clock(running.step(1)) > PATIENCE
            turns = min(FEW, rounds) if slow else rounds
            entry = Entry(running, turns, contender=contender)
            entries[contender.name] = entry
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed"
            rows[contender.name] = replace(blank, status="skipped", reason=reason)
        except Exception as error:
            rows[contender.name] = _failed(blank, error)
    broken = take_turns(
        entries,
        rounds,
        clock=clock,
        rest=rest,
        progress=lambda doing: progress(f"{case.name}: {doing}"),
    )
    for name, error in broken.items():
        rows[name] = _failed(_blank(workload, entries.pop(name).contender), error)
    base = next((entries[name] for name in OURS if name in entries), None)
    for name, entry in entries.items():
        rows[name] = _timed(workload, entry, base, entries.get(COPY))
    entries.clear()
    workload.shared.clear()
    gc.collect()  # the tables of a case, before those of the next
    return [rows[contender.name] for contender in contenders]


def take_turns(
    entries: Mapping[str, Turns],
    rounds: int,
    *,
    clock: Clock = wall_clock,
    rest: float = REST,
    progress: Callable[[str], object] = lambda doing: None,
) -> dict[str, Exception]:
    """Times all in turn, round by round; returns what broke, and why."""
    broken: dict[str, Exception] = {}
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for name, entry in entries.items():
            if turn >= entry.rounds or name in broken:
                continue
            try:
                time.sleep(rest)
                # The first call wakes threads and caches its code; with other rows.
                entry.running.step(2 * turn)()
                entry.times.append(clock(entry.running.step(2 * turn + 1)))
            except Exception as error:
                broken[name] = error
    return broken


def _objection(contender: Contender, case: Case) -> str | None:
    if contender.host_only and jax.default_backend() != "cpu":
        return "runs on the CPU, and the tables are elsewhere"
    return contender.unsupported(case)


def _timed(
    workload: Workload, entry: Entry, base: Entry | None, copy: Entry | None
) -> Row:
    """The row with its times, and what they are worth."""
    times, moved = entry.times, _bytes_moved(workload, entry.contender)
    middle = statistics.spread(times)
    share = ratio = None
    if copy is not None:
        size = _bytes_moved(workload, copy.contender)
        share = moved / size / statistics.interleaved_ratio(times, copy.times)
    if base is not None and entry.contender.expected is not None:
        ratio = statistics.interleaved_ratio(times, base.times)
    return replace(
        _blank(workload, entry.contender),
        status="ok",
        compile_s=round(entry.running.compile_seconds, 3),
        ms=tuple(round(1e3 * t, 4) for t in times),
        p20_ms=round(1e3 * middle.p20, 4),
        p50_ms=round(1e3 * middle.p50, 4),
        p80_ms=round(1e3 * middle.p80, 4),
        least_ms=round(1e3 * middle.least, 4),
        bytes=moved,
        gb_per_s=round(moved / 1e9 / middle.p50, 3),
        share_of_copy=None if share is None else round(share, 4),
        ratio=None if ratio is None else round(ratio, 3),
    )


def _bytes_moved(workload: Workload, contender: Contender) -> float:
    return contender.moves or workload.least_bytes(contender.slots)


def _blank(workload: Workload, contender: Contender) -> Row:
    case = workload.case
    return Row(
        case=case.name,
        rows=case.num_rows,
        dim=case.dim,
        ids=case.num_ids,
        distribution=case.distribution,
        dtypes=case.dtypes,
        options=dict(case.options),
        impl=contender.name,
        title=contender.title,
        unique=workload.unique,
        repeats=case.repeats if case.distribution == "repeated" else 0,
    )


def _failed(blank: Row, error: Exception) -> Row:
    words = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {words}"[:300]
    return replace(blank, status="failed", reason=reason)
