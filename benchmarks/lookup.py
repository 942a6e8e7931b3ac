"""`python -m benchmarks lookup`: bags of ids on a CPU, looked up and combined.

Ours in C++, the path through XLA that it replaces, and `torch.nn.EmbeddingBag`, in
turn and on the same tables and ids. Each contender's numbers are compared before it is
timed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import cases, lines
from benchmarks.contenders.torch_programs import import_torch
from benchmarks.options import choices_option, out_option, rounds_option
from benchmarks.results import Row
from benchmarks.run import Progress, run_cases
from benchmarks.timing import (
    Turns,
    require_cpu,
    time_beside_ours,
    wall_clock,
)
from sparse_adam.kernels.cpu.lookup import combine_rows

ROUNDS, QUICK_ROUNDS = 40, 5
BATCHES = 8
LEGEND = (
    "ms is the median of calls that took turns with those of all others; x ours is the "
    "median of the ratios within a round, with bounds that hold it nine times in ten. "
    "compile is in seconds, and in no time. All give the same sums, to 1e-4."
)
Call = Callable[[int], Any]  # the lookup of a batch, which has been waited for


@dataclass(frozen=True)
class Case:
    """A table `[rows, dim]`, and samples of as many ids as there are places."""

    name: str
    distribution: str
    rows: int = 1_000_000
    dim: int = 64
    samples: int = 4096
    places: int = 20
    form: str = "padded"  # or "sparse": with the sample of each id, in no order


CASES = (
    Case("uniform", "uniform"),
    Case("zipf", "zipf"),
    Case("dim_128", "uniform", dim=128),
    Case("dim_128_zipf", "zipf", dim=128),
    Case("dim_16", "uniform", dim=16),
    Case("dim_16_zipf", "zipf", dim=16),
    Case("sparse", "uniform", form="sparse"),
    Case("sparse_zipf", "zipf", form="sparse"),
)
QUICK = (
    Case("quick", "zipf", rows=50_000, samples=512),
    Case("quick_sparse", "zipf", rows=50_000, samples=512, form="sparse"),
)


@dataclass(frozen=True)
class Workload:
    """The table and the batches of a case."""

    case: Case
    table: np.ndarray
    batches: Sequence[np.ndarray]  # of ids, int32, sample by sample
    order: np.ndarray  # in which sparse ids come

    @classmethod
    def of(cls, case: Case) -> "Workload":
        """Draws the same numbers at every call."""
        rng = np.random.default_rng(0)
        table = rng.standard_normal((case.rows, case.dim), dtype=np.float32)
        num_ids = case.samples * case.places
        batches = [
            cases.ids(rng, case.distribution, case.rows, num_ids)
            for _ in range(BATCHES)
        ]
        return cls(case, table, batches, rng.permutation(num_ids))

    @property
    def owners(self) -> np.ndarray:
        """The sample of each id."""
        case = self.case
        return np.repeat(np.arange(case.samples, dtype=np.int32), case.places)

    def expected(self) -> np.ndarray:
        """The first batch, combined in float64."""
        rows = self.table[self.batches[0]].astype(np.float64)
        return rows.reshape(self.case.samples, self.case.places, -1).sum(1)


def ours(workload: Workload) -> Call:
    """The kernel in C++."""
    case, order = workload.case, workload.order
    table = jnp.array(workload.table)
    if case.form == "padded":
        batches = [(jnp.array(ids), None) for ids in workload.batches]
    else:
        owners = jnp.array(workload.owners[order])
        batches = [(jnp.array(ids[order]), owners) for ids in workload.batches]

    @jax.jit
    def run(table: jax.Array, ids: jax.Array, samples: jax.Array | None) -> jax.Array:
        return combine_rows(table, ids, num_samples=case.samples, samples=samples)

    return lambda turn: run(table, *batches[turn % BATCHES]).block_until_ready()


def xla(workload: Workload) -> Call:
    """A gather, then a sum, as the embedding API has it."""
    case, order = workload.case, workload.order
    table = jnp.array(workload.table)
    padded = case.form == "padded"
    batches = [jnp.array(x if padded else x[order]) for x in workload.batches]
    owners = jnp.array(workload.owners[order])

    @jax.jit
    def run(table: jax.Array, ids: jax.Array, owners: jax.Array) -> jax.Array:
        rows = jnp.where((ids >= 0)[:, None], table.at[ids].get(mode="clip"), 0)
        if padded:
            return rows.reshape(case.samples, case.places, case.dim).sum(1)
        return jax.ops.segment_sum(rows, owners, case.samples)

    return lambda turn: run(table, batches[turn % BATCHES], owners).block_until_ready()


def torch_bag(workload: Workload) -> Call:
    """`torch.nn.EmbeddingBag` with as many threads as cores, without gradients.

    It takes ids sample by sample only. Its table is allocated by torch: NumPy asks for
    huge pages, which torch and JAX do not.
    """
    torch, case = import_torch(), workload.case
    weights = torch.from_numpy(workload.table).clone()
    bag = torch.nn.EmbeddingBag(case.rows, case.dim, mode="sum", _weight=weights)
    shape = case.samples, case.places
    batches = [
        torch.from_numpy(ids.astype(np.int64).reshape(shape))
        for ids in workload.batches
    ]

    def call(turn: int) -> Any:
        with torch.no_grad():
            return bag(batches[turn % BATCHES])

    return call


# Name: its title in tables, and what starts it. Ours is the first.
CONTENDERS: dict[str, tuple[str, Callable[[Workload], Call]]] = {
    "ours": ("sparse_adam, C++", ours),
    "xla": ("sparse_adam, XLA", xla),
    "torch": ("torch.nn.EmbeddingBag", torch_bag),
}


@dataclass
class Lookup:
    """A contender that has been compiled and looks up batches."""

    call: Call
    compile_seconds: float = 0.0

    def step(self, turn: int) -> Callable[[], Any]:
        """Returns the lookup of a batch; it waits for the result."""
        return partial(self.call, turn)


def measure(
    case: Case,
    impls: Sequence[str],
    rounds: int,
    progress: Progress = lambda doing: None,
) -> list[Row]:
    """Returns a row for each contender, timed or with the reason why it is not."""
    workload = Workload.of(case)
    right = workload.expected()

    def start(impl: str) -> Turns:
        require_cpu()
        running = Lookup(CONTENDERS[impl][1](workload))
        began = time.perf_counter()
        found = np.asarray(running.call(0))
        first = time.perf_counter() - began
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
        seconds = wall_clock(running.step(1))
        running.compile_seconds = max(0.0, first - seconds)
        return Turns.of(running, seconds, rounds)

    titles = {impl: CONTENDERS[impl][0] for impl in impls}
    return time_beside_ours(
        *(_blank(workload), titles, start, rounds),
        lambda doing: progress(f"{case.name}: {doing}"),
    )


def _blank(workload: Workload) -> Row:
    case = workload.case
    return Row(
        case=case.name,
        rows=case.rows,
        dim=case.dim,
        ids=case.samples * case.places,
        distribution=case.distribution,
        dtypes=("float32",),
        options={"samples": case.samples, "places": case.places, "form": case.form},
        impl="",
        title="",
        unique=float(np.mean([np.unique(ids).size for ids in workload.batches])),
    )


@click.command()
@choices_option(
    *("--case", "names", [case.name for case in (*CASES, *QUICK)], "A named case"),
    otherwise="all but the quick ones",
)
@choices_option("--impl", "impls", CONTENDERS, "A contender")
@click.option("--quick", is_flag=True, help="Two small cases and few rounds.")
@rounds_option("Timed calls of each contender in a case.")
@out_option("lookup.json")
def lookup(
    names: tuple[str, ...],
    impls: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    out: Path,
) -> None:
    """Time the lookup of bags on this machine: ours, through XLA, and torch's."""
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    known = {case.name: case for case in (*CASES, *QUICK)}
    chosen = [known[name] for name in names] or (QUICK if quick else CASES)
    run_cases(
        *("lookup", [(case, impls or tuple(CONTENDERS)) for case in chosen]),
        *(rounds, out),
        measure=lambda case, impls, progress: measure(case, impls, rounds, progress),
        show=_print,
        legend=LEGEND,
    )


def _print(console: Console, case: Case, found: Sequence[Row]) -> None:
    title = (
        f"{case.name}: V = {case.rows:,}, D = {case.dim}, {case.samples:,} samples of "
        f"{case.places} {case.distribution} ids, {case.form}"
    )
    lines.ratios(console, title, found)
