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
from benchmarks.run import Progress
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

    @classmethod
    def of(cls, running: Steps, seconds: float, rounds: int) -> "Turns":
        """Returns the turns of a contender whose last call took so many seconds."""
        return cls(running, min(FEW, rounds) if seconds > PATIENCE else rounds)


class SkippedError(Exception):
    """A contender cannot do a case here; the words say why."""


def measure(
    case: Case,
    contenders: Sequence[Contender],
    rounds: int,
    *,
    clock: Clock = wall_clock,
    rest: float = REST,
    progress: Progress = lambda doing: None,
) -> list[Row]:
    """Returns a row for each contender, timed or with the reason why it is not."""
    workload = Workload.of(case)
    entered = {contender.name: contender for contender in contenders}

    def start(name: str) -> Turns:
        contender = entered[name]
        if contender.host_only:
            require_cpu()
        if (reason := contender.unsupported(case)) is not None:
            raise SkippedError(reason)
        running = contender.start(workload)
        check(contender, running, workload)
        return Turns.of(running, clock(running.step(1)), rounds)

    rows, entries = time_in_turn(
        {name: _blank(workload, contender) for name, contender in entered.items()},
        start,
        rounds,
        clock=clock,
        rest=rest,
        progress=lambda doing: progress(f"{case.name}: {doing}"),
    )
    base = next((entries[name] for name in OURS if name in entries), None)
    moved = {name: _bytes_moved(workload, entered[name]) for name in entries}
    for name, entry in entries.items():
        row = rows[name].timed(entry.times, entry.running.compile_seconds)
        share = ratio = None
        if COPY in entries:
            beside = statistics.interleaved_ratio(entry.times, entries[COPY].times)
            share = round(moved[name] / moved[COPY] / beside, 4)
        if base is not None and entered[name].expected is not None:
            ratio = round(statistics.interleaved_ratio(entry.times, base.times), 3)
        rows[name] = replace(
            row,
            bytes=moved[name],
            gb_per_s=round(moved[name] / 1e6 / row.p50_ms, 3),
            share_of_copy=share,
            ratio=ratio,
        )
    entries.clear()
    workload.shared.clear()
    gc.collect()  # the tables of a case, before those of the next
    return list(rows.values())


def time_in_turn(
    blanks: Mapping[str, Row],
    start: Callable[[str], Turns],
    rounds: int,
    *,
    clock: Clock = wall_clock,
    rest: float = REST,
    progress: Progress = lambda doing: None,
) -> tuple[dict[str, Row], dict[str, Turns]]:
    """Starts contenders and times them in turn.

    Whatever goes wrong with one of them becomes the reason in its row.

    Args:
        blanks: the row of each contender, without times.
        start: makes the contender of a name ready to be timed, or raises.
        rounds: in each of which every contender is called once.
        clock: makes a call and returns its seconds.
        rest: seconds between two contenders.
        progress: is told what is being done.

    Returns:
        The rows of all contenders, and of those that broke nowhere the times, which
        are not in the rows yet.
    """
    rows, entries = dict(blanks), {}
    for name, blank in blanks.items():
        progress(name)
        try:
            entries[name] = start(name)
        except SkippedError as error:
            rows[name] = blank.skipped(f"{error}")
        except ModuleNotFoundError as error:
            rows[name] = blank.skipped(f"{error.name} is not installed")
        except Exception as error:
            rows[name] = blank.failed(error)
    broken = take_turns(entries, rounds, clock=clock, rest=rest, progress=progress)
    for name, error in broken.items():
        rows[name] = rows[name].failed(error)
        del entries[name]
    return rows, entries


def time_beside_ours(
    blank: Row,
    titles: Mapping[str, str],
    start: Callable[[str], Turns],
    rounds: int,
    progress: Progress,
) -> list[Row]:
    """Times contenders as `time_in_turn` does; returns rows with ratios to ours.

    Args:
        blank: a row of the case, without a contender.
        titles: of the contenders, by name; ours is called "ours".
        start: makes the contender of a name ready to be timed, or raises.
        rounds: in each of which every contender is called once.
        progress: is told what is being done.
    """
    blanks = {name: replace(blank, impl=name, title=titles[name]) for name in titles}
    rows, entries = time_in_turn(blanks, start, rounds, progress=progress)
    base = entries.get("ours")
    for name, entry in entries.items():
        row = rows[name].timed(entry.times, entry.running.compile_seconds)
        rows[name] = row.compared(entry.times, base.times) if base else row
    entries.clear()
    gc.collect()  # the tables of a case, before those of the next
    return list(rows.values())


def take_turns(
    entries: Mapping[str, Turns],
    rounds: int,
    *,
    clock: Clock = wall_clock,
    rest: float = REST,
    progress: Progress = lambda doing: None,
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


def require_cpu() -> None:
    """Skips what runs on the CPU only, where JAX puts tables elsewhere."""
    if jax.default_backend() != "cpu":
        raise SkippedError("runs on the CPU, and the tables are elsewhere")


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
