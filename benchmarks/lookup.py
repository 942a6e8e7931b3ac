"""`python -m benchmarks lookup`: bags of ids on a CPU, looked up and combined.

Ours in C++, the path through XLA that it replaces, and `torch.nn.EmbeddingBag`, in
turn and on the same tables and ids. Each contender's numbers are compared before it is
timed.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from benchmarks.statistics import interleaved_ratio, spread
from sparse_adam.kernels.cpu.lookup import combine_rows

REST = 0.02  # seconds in which the threads of the one before cease to spin
BATCHES = 8
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
        rows = rng.permutation(case.rows).astype(np.int32)
        num_ids = case.samples * case.places

        def draw() -> np.ndarray:
            if case.distribution == "uniform":
                return rng.choice(rows, num_ids)
            ranks = np.arange(1, case.rows + 1, dtype=np.float64)
            shares = np.cumsum(ranks**-1.2)
            found = np.searchsorted(shares, rng.random(num_ids) * shares[-1])
            return rows[np.minimum(found, case.rows - 1)]

        batches = [draw() for _ in range(BATCHES)]
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
    torch = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    case = workload.case
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


CONTENDERS: dict[str, Callable[[Workload], Call]] = {
    "ours": ours,
    "xla": xla,
    "torch": torch_bag,
}


def measure(
    case: Case, names: Sequence[str], rounds: int
) -> Iterator[tuple[str, list[float] | str]]:
    """Yields each contender's times in seconds, or why it has none."""
    workload = Workload.of(case)
    calls: dict[str, Call] = {}
    right = workload.expected()
    for name in names:
        try:
            calls[name] = CONTENDERS[name](workload)
        except ModuleNotFoundError as error:
            yield name, f"{error.name} is not installed"
            continue
        found = np.asarray(calls[name](0))
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4, err_msg=name)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            time.sleep(REST)
            call(2 * turn)  # wakes threads and caches code; with other rows
            began = time.perf_counter()
            call(2 * turn + 1)
            times[name].append(time.perf_counter() - began)
    yield from times.items()


@click.command()
@click.option(
    "--case",
    "cases",
    multiple=True,
    type=click.Choice([case.name for case in CASES]),
    help="A named case; again for more. Default: all.",
)
@click.option(
    "--impl",
    "impls",
    multiple=True,
    type=click.Choice(list(CONTENDERS)),
    help="A contender; again for more. Default: all.",
)
@click.option("--rounds", default=40, show_default=True, help="Timed calls of each.")
def lookup(cases: tuple[str, ...], impls: tuple[str, ...], rounds: int) -> None:
    """Time the lookup of bags on this machine: ours, through XLA, and torch's.

    The last column is the median, over the rounds, of a contender's time over ours.
    """
    console = Console(highlight=False, width=100)
    columns = ("case", "V", "D", "ids", "lookup", "p20, ms", "p50, ms", "x ours")
    table = Table(*(Column(name, no_wrap=True) for name in columns))
    for case in CASES:
        if cases and case.name not in cases:
            continue
        found = dict(measure(case, impls or tuple(CONTENDERS), rounds))
        base = found.get("ours")
        for name, times in found.items():
            row = [case.name, f"{case.rows:,}", f"{case.dim}"]
            row += [f"{case.samples:,} x {case.places}", name]
            if isinstance(times, str):
                table.add_row(*row, times)
                continue
            middle = spread(times)
            row += [f"{1e3 * middle.p20:.2f}", f"{1e3 * middle.p50:.2f}"]
            if isinstance(base, list):
                row.append(f"{interleaved_ratio(times, base):.2f}")
            table.add_row(*row)
    console.print(table)
