"""`python -m benchmarks routing`: what a routed batch costs on many chips; no TPU."""

import os
import re
import time
from collections.abc import Iterator, Sequence
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

from benchmarks import results, routing_tables
from benchmarks.options import choices_option, out_option
from benchmarks.routed_batches import (
    CONTIGUOUS,
    DISTRIBUTIONS,
    IDS_OF_SAMPLE,
    table_rows,
    traffic,
)
from benchmarks.static.compiler import WITHOUT_TPU
from benchmarks.static.hlo import arrays_of
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.rounds import default_quota

# Name of the topology, and its devices; a device of 7x is half a chip.
TOPOLOGIES = {
    "v6e:2x2": 4,
    "v6e:4x4": 16,
    "v6e:8x8": 64,
    "v6e:16x16": 256,
    "v5p:4x4x4": 64,
    "tpu7x:4x4x4": 128,
}
FORMS = ("padded", "ragged")
# Ragged ids have a second route, which grows with the devices as the first one does.
RAGGED = ("v6e:2x2", "v6e:4x4")
_COLLECTIVE = re.compile(
    r" = (?P<type>\(.*?\)|\S+) (?P<name>ragged-all-to-all|all-to-all|all-gather"
    r"|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
)


@dataclass(frozen=True)
class Batch:
    """The ids of a chip: how many, in how many places of a sample, of which width."""

    form: str  # of `FORMS`
    ids: int
    places: int
    dim: int

    @property
    def samples(self) -> int:
        """Returns how many samples a chip has."""
        return self.ids // self.places


@dataclass(frozen=True)
class Collective:
    """A collective of a compiled program."""

    name: str
    shape: tuple[int, ...]  # of what a device receives
    bytes: int  # of it, with the padding of its layout
    further: bool  # used where a batch takes more than one round only


@dataclass(frozen=True)
class Program:
    """A training step of one table, compiled for a slice."""

    topology: str
    chips: int
    seconds: float  # of compiling
    temporary_bytes: int
    in_place_bytes: int
    collectives: tuple[Collective, ...]

    @property
    def first_round(self) -> tuple[Collective, ...]:
        """Returns the collectives that every batch needs."""
        return tuple(each for each in self.collectives if not each.further)

    @property
    def received_bytes(self) -> int:
        """Returns the sizes of the buffers that a device receives in one round."""
        return sum(each.bytes for each in self.first_round)


def slice_mesh(topology: str, chips: int) -> Any:
    """Returns a mesh of devices that need not be there, to compile for."""

    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    return Mesh(np.array(devices), ("chip",))


def lower_step(mesh: Any, batch: Batch) -> Any:
    """Lowers a lookup and an update of the embedding API, by Adam, of packed rows.

    A table of 1,000 rows a chip will do: no size but its own depends on it. The ids are
    arguments, so the program is the same for all batches of these sizes.
    """

    from sparse_adam.embedding import (
        Adam,
        FeatureConfig,
        Ragged,
        TableConfig,
        apply_gradients,
        init,
        lookup,
    )

    chips, place = mesh.size, NamedSharding(mesh, PartitionSpec("chip"))
    whole = NamedSharding(mesh, PartitionSpec())
    table = TableConfig(1000 * chips, batch.dim, combiner="sum", name="table")

    def start() -> Any:
        key = jax.random.key(0)
        return init(FeatureConfig(table), Adam(), key, storage="packed", mesh=mesh)

    def step(state: Any, ids: Any, factors: Any) -> Any:
        gradients = factors * lookup(state, ids)
        return apply_gradients(state, ids, gradients)

    def array(*shape: int, dtype: Any = jnp.float32, sharding: Any = place) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    samples = batch.samples * chips
    ids: Any = array(samples, batch.places, dtype=jnp.int32)
    if batch.form == "ragged":
        splits = array(samples + 1, dtype=jnp.int32, sharding=whole)
        ids = Ragged(array(batch.ids * chips, dtype=jnp.int32), splits)
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x: array(*x.shape, dtype=x.dtype), jax.eval_shape(start)
        )
        factors = array(samples, batch.dim)
        return jax.jit(step, donate_argnums=0).lower(state, ids, factors)


def compiled(lowered: Any, topology: str, chips: int) -> Program:
    """Compiles a program and reads its collectives and its memory."""
    started = time.perf_counter()
    found = lowered.compile()
    seconds = time.perf_counter() - started
    memory: Any = found.memory_analysis()
    return Program(
        topology=topology,
        chips=chips,
        seconds=round(seconds, 1),
        temporary_bytes=memory.temp_size_in_bytes,
        in_place_bytes=memory.alias_size_in_bytes,
        collectives=tuple(collectives(found.as_text() or "")),
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
    distributions: Sequence[str], ids: int, samples: int, chips: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yields what the chips would send each other, for each distribution of ids."""
    for distribution in distributions:
        size = samples * IDS_OF_SAMPLE if distribution == "dlrm" else ids
        kinds = (True, False) if distribution in CONTIGUOUS else (True,)
        for interleaved in kinds:
            for count in chips:
                placement = Placement(
                    table_rows(distribution, count), count, interleaved
                )
                quota = default_quota(size, count)
                found = traffic(distribution, size, placement, quota)
                yield {
                    "kind": "traffic",
                    "distribution": distribution,
                    "chips": count,
                    "interleaved": interleaved,
                    "ids": size,
                    "quota": quota._asdict(),
                    **asdict(found),
                }


@click.command()
@choices_option("--topology", "topologies", TOPOLOGIES, "What to compile for")
@click.option("--ids", default=4096, show_default=True, help="On each chip.")
@click.option("--places", default=8, show_default=True, help="Ids of a sample.")
@click.option("--dim", default=128, show_default=True, help="D, lanes of a row.")
@click.option("--compile/--no-compile", "compiling", default=True, show_default=True)
@click.option("--simulate/--no-simulate", "simulating", default=True, show_default=True)
@choices_option(
    "--distribution", "distributions", DISTRIBUTIONS, "Of the simulated ids"
)
@click.option(
    "--samples",
    default=512,
    show_default=True,
    help=f"Of dlrm on each chip, with {IDS_OF_SAMPLE} ids each.",
)
@click.option(
    "--chips",
    multiple=True,
    type=int,
    default=(4, 16, 64, 256),
    show_default=True,
    help="Numbers of chips to simulate.",
)
@click.option("--keep", is_flag=True, help="Keep what the result file has of all else.")
@out_option("routing.json")
def routing(
    topologies: tuple[str, ...],
    ids: int,
    places: int,
    dim: int,
    compiling: bool,
    simulating: bool,
    distributions: tuple[str, ...],
    samples: int,
    chips: tuple[int, ...],
    keep: bool,
    out: Path,
) -> None:
    """Compile a routed step for slices of TPUs, and count what batches would send.

    The step is a lookup and an update of the embedding API, of samples with several
    ids. The first table shows the buffers that a chip receives in one round, with the
    padding of their layouts, and the temporaries of the program. The second one shows
    the rows that the ragged exchange is given, and the rounds that they take.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in WITHOUT_TPU.items()})
    console = Console(highlight=False, soft_wrap=True)
    started = results.now()
    records = results.read_routing(out)["records"] if keep and out.exists() else []

    def write(*new: dict[str, Any]) -> None:
        made = {_name(record) for record in new}
        records[:] = [record for record in records if _name(record) not in made]
        records.extend(new)
        head = {
            "schema": results.SCHEMA,
            "command": "routing",
            "config": {"ids": ids, "places": places, "dim": dim, "samples": samples},
            "started": started,
            "commit": results.commit(),
            "versions": results.package_versions(),
        }
        results.write(out, head, "records", records)

    if simulating:
        write(*simulate(distributions or DISTRIBUTIONS, ids, samples, chips))
    for form in FORMS if compiling else ():
        chosen = topologies or (RAGGED if form == "ragged" else tuple(TOPOLOGIES))
        for topology in chosen:
            mesh = slice_mesh(topology, TOPOLOGIES[topology])
            batch = Batch(form, ids, places, dim)
            found = compiled(lower_step(mesh, batch), topology, mesh.size)
            write({"kind": "program", **asdict(batch), **asdict(found)})
            console.print(f"compiled {form} ids for {topology}")
    for title, table in routing_tables.TABLES.items():
        header, lines = table({"config": {"dim": dim}, "records": records})
        if lines:
            console.print(_rich(title, header, lines))
    console.print(f"Wrote {out}")


def _name(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what a record is of; there is one of each."""
    keys = ("kind", "form", "topology", "distribution", "interleaved", "chips")
    return tuple(record.get(key) for key in keys)


def _rich(title: str, header: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table
