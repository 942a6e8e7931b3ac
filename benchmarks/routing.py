"""`python -m benchmarks routing`: what a routed batch costs on many chips; no TPU."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks import results
from benchmarks.options import choices_option, out_option
from benchmarks.routed_batches import DISTRIBUTIONS, Traffic, table_rows, traffic
from benchmarks.static.compiler import WITHOUT_TPU
from benchmarks.static.hlo import arrays_of
from sparse_adam.ops import routing as ops
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.rounds import default_quota

# Name of the topology, and its chips; a device of 7x is half a chip.
TOPOLOGIES = {
    "v6e:2x2": 4,
    "v6e:4x4": 16,
    "v6e:8x8": 64,
    "v6e:16x16": 256,
    "v5p:4x4x4": 64,
    "tpu7x:4x4x4": 128,
}
_COLLECTIVE = re.compile(
    r" = (?P<type>\(.*?\)|\S+) (?P<name>ragged-all-to-all|all-to-all|all-gather"
    r"|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
)


@dataclass(frozen=True)
class Collective:
    """A collective of a compiled program."""

    name: str
    shape: tuple[int, ...]  # of what a device receives
    bytes: int  # of it, with the padding of its layout
    further: bool  # used where a batch takes more than one round only


@dataclass(frozen=True)
class Program:
    """A lookup and an update, compiled for a slice."""

    topology: str
    chips: int
    ids: int  # on each chip
    dim: int
    seconds: float  # of compiling
    temporary_bytes: int
    collectives: tuple[Collective, ...]

    @property
    def received_bytes(self) -> int:
        """Returns the sizes of the buffers that a device receives in one round."""
        return sum(each.bytes for each in self.collectives if not each.further)


def compile_step(topology: str, chips: int, ids: int, dim: int) -> Program:
    """Compiles route, lookup and update, with gathers and scatters of XLA for a table.

    A table of 1,000 rows a chip will do: no size depends on it.
    """
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    mesh, spec = Mesh(np.array(devices), ("chip",)), PartitionSpec("chip")
    placement = Placement(1000 * chips, chips, interleaved=True)

    def update(table: jax.Array, rows: jax.Array, grads: jax.Array) -> jax.Array:
        outside = jnp.where(rows < 0, placement.rows_per_shard, rows)
        return table.at[outside].add(grads, mode="drop")

    def step(
        table: jax.Array, ids: jax.Array, grads: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        route = ops.route(ids, placement, "chip")
        found = ops.lookup(route, lambda rows: table.at[rows].get(mode="clip"))
        return ops.update(route, grads * found, table, update), found

    def placed(rows: int, *shape: int, dtype: Any = jnp.float32) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    lowered = jax.jit(mapped, donate_argnums=0).lower(
        placed(placement.end, dim),
        placed(chips * ids, dtype=jnp.int32),
        placed(chips * ids, dim),
    )
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    return Program(
        topology=topology,
        chips=chips,
        ids=ids,
        dim=dim,
        seconds=round(seconds, 1),
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=tuple(collectives(compiled.as_text() or "")),
    )


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives of a program in HLO."""
    for line in text.splitlines():
        if found := _COLLECTIVE.search(line):
            # Of an asynchronous one, the last array is the result.
            array = arrays_of(found["type"])[-1]
            yield Collective(
                found["name"],
                array.shape,
                array.bytes,
                "further_round" in line or "search_of_cut" in line,
            )


def simulate(
    distributions: tuple[str, ...], ids: int, chips: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yields what the chips would send each other, for each distribution of ids."""
    for distribution in distributions:
        for count in chips:
            for interleaved in (True, False):
                placement = Placement(table_rows(distribution), count, interleaved)
                quota = default_quota(ids, count)
                found = traffic(distribution, ids, placement, quota)
                yield {
                    "distribution": distribution,
                    "chips": count,
                    "interleaved": interleaved,
                    "ids": ids,
                    **asdict(found),
                }


@click.command()
@choices_option("--topology", "topologies", TOPOLOGIES, "What to compile for")
@click.option("--ids", default=4096, show_default=True, help="On each chip.")
@click.option("--dim", default=128, show_default=True, help="D, lanes of a row.")
@click.option("--compile/--no-compile", "compiling", default=True, show_default=True)
@click.option("--simulate/--no-simulate", "simulating", default=True, show_default=True)
@choices_option(
    "--distribution", "distributions", DISTRIBUTIONS, "Of the simulated ids"
)
@click.option(
    "--chips",
    multiple=True,
    type=int,
    default=(4, 16, 64, 256),
    show_default=True,
    help="Numbers of chips to simulate.",
)
@out_option("routing.json")
def routing(
    topologies: tuple[str, ...],
    ids: int,
    dim: int,
    compiling: bool,
    simulating: bool,
    distributions: tuple[str, ...],
    chips: tuple[int, ...],
    out: Path,
) -> None:
    """Compile a routed step for slices of TPUs, and count what batches would send.

    The first table shows the buffers that a chip receives in one round, with the
    padding of their layouts, and the temporaries of the program. The second one shows
    the rows that a chip asks for and is asked for, and the rounds that they take.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in WITHOUT_TPU.items()})
    console, started = Console(), results.now()
    programs: list[Program] = []
    rows: list[dict[str, Any]] = []
    if compiling:
        for topology in topologies or TOPOLOGIES:
            programs.append(compile_step(topology, TOPOLOGIES[topology], ids, dim))
            console.print(f"compiled for {topology}", highlight=False)
        console.print(_table_of_programs(programs))
    if simulating:
        rows = list(simulate(distributions or DISTRIBUTIONS, ids, chips))
        console.print(_table_of_traffic(rows, dim))
    head = {
        "command": "routing",
        "config": {"ids": ids, "dim": dim},
        "started": started,
        "commit": results.commit(),
        "versions": results.package_versions(),
        "programs": [asdict(each) for each in programs],
    }
    results.write(out, head, "rows", rows)


def _table_of_programs(programs: list[Program]) -> Table:
    table = Table(title="Compiled: bytes that one device receives in one round, MB")
    for name in ("slice", "devices", "all", "rows and gradients", "the rest"):
        table.add_column(name, justify="right")
    table.add_column("temporaries", justify="right")
    table.add_column("compiled in", justify="right")
    for each in programs:
        rows = sum(c.bytes for c in each.collectives if c.name == "ragged-all-to-all")
        cells = (each.received_bytes, rows, each.received_bytes - rows)
        table.add_row(
            each.topology,
            str(each.chips),
            *(f"{cell / 1e6:.3f}" for cell in (*cells, each.temporary_bytes)),
            f"{each.seconds:.0f} s",
        )
    return table


def _table_of_traffic(rows: list[dict[str, Any]], dim: int) -> Table:
    table = Table(title="Simulated: what a chip asks for and is asked for")
    for name in ("ids", "chips", "placement", "unique", "received", "most", "rounds"):
        table.add_column(name, justify="right")
    table.add_column("MB there and back, mean", justify="right")
    table.add_column("most", justify="right")
    for row in rows:
        traffic = Traffic(**{k: row[k] for k in Traffic.__dataclass_fields__})
        mean, most = (
            (4 * dim * traffic.unique + (4 * dim + 4) * received) / 1e6
            for received in (traffic.received, traffic.most_received)
        )
        table.add_row(
            row["distribution"],
            str(row["chips"]),
            "interleaved" if row["interleaved"] else "contiguous",
            f"{traffic.unique:.0f}",
            f"{traffic.received:.0f}",
            f"{traffic.most_received}",
            f"{traffic.rounds}",
            f"{mean:.2f}",
            f"{most:.2f}",
        )
    return table
