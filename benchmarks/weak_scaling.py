"""What the bytes of a routed step predict on more and more chips: bounds, no timings.

The network. In a torus each chip has links to its neighbours, so a message takes part
of the bandwidth of every link on its way. Two places may be the narrowest:

- the links of one chip: it receives b bytes, of which a share of 1 / n is its own;
- the links that a plane through the middle cuts. Of n chips, either half sends the
  other one n b / 4 bytes, by as many links as the plane cuts: n / k of a mesh whose
  side across the plane is k, and twice as many of a torus.

The chip. What a step of one table issues and moves for each id, without routing
(`python -m benchmarks step --static`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.colours import GREY, INK, OUR_COLOUR
from benchmarks.results import read_routing, read_steps
from benchmarks.routed_batches import message_bytes
from benchmarks.static.stages import EMBEDDING
from benchmarks.static.tables import Table
from benchmarks.steps.tables import ONE_TABLE, ns_an_id
from sparse_adam.ops.routing.rounds import default_quota

SHAPES = {
    2: ((2, 2), (4, 4), (8, 8), (16, 16)),
    3: ((2, 2, 1), (2, 2, 4), (4, 4, 4), (4, 8, 8)),
}
STEPS = "step_static.json"  # beside the file of `routing`


@dataclass(frozen=True)
class Network:
    """The links between the chips of a generation.

    Bandwidths: docs.cloud.google.com/tpu/docs, the pages v5e, v6e, v5p and tpu7x, which
    give those of all links of a chip in both ways: 400, 800, 1,200 and 1,200 GB/s.
    Which slices are closed to rings: the page v5p, and for v5e and v6e
    jax-ml.github.io/scaling-book/tpus (full axes of 16 chips).
    """

    chip: str
    bandwidth: float  # GB/s, of all links of a chip in both ways
    axes: int  # of the torus
    ring: int  # a slice is a torus if this divides all its sides; else a mesh
    devices: int = 1  # of JAX on a chip

    @property
    def link(self) -> float:
        """Returns the GB/s of one link in one way."""
        return self.bandwidth / (4 * self.axes)

    def is_torus(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the last chip of each line is linked to the first."""
        return all(side % self.ring == 0 for side in shape)

    def ns_into_a_chip(self, shape: tuple[int, ...], received: float) -> float:
        """Returns the time in which the bytes of a chip pass the links of a corner."""
        links = sum(side > 1 for side in shape) * (1 + self.is_torus(shape))
        chips = math.prod(shape)
        return received * (chips - 1) / chips / (links * self.link)

    def bisection(self, shape: tuple[int, ...]) -> float:
        """Returns the GB/s in one way through the narrowest middle of a slice."""
        return math.prod(shape) / max(shape) * (1 + self.is_torus(shape)) * self.link

    def ns_through_the_middle(self, shape: tuple[int, ...], received: float) -> float:
        """Returns the time in which what one half sends the other passes the middle."""
        return math.prod(shape) * received / 4 / self.bisection(shape)


NETWORKS = (
    Network("v5e", 400, 2, 16),
    Network("v6e", 800, 2, 16),
    Network("v5p", 1200, 3, 4),
    Network("7x", 1200, 3, 4, devices=2),
)


@dataclass(frozen=True)
class Prediction:
    """Least nanoseconds of a step for each id of a device, by what takes them."""

    chip: str
    shape: tuple[int, ...]
    torus: bool
    received: float  # bytes an id
    into: float
    middle: float
    hbm: float
    issue: float

    @property
    def chips(self) -> int:
        """Returns the number of chips."""
        return math.prod(self.shape)

    @property
    def network(self) -> float:
        """Returns the least time of the links."""
        return max(self.into, self.middle)

    @property
    def one_after_another(self) -> float:
        """Returns the least time of a step that does nothing while it sends."""
        return self.network + max(self.hbm, self.issue)


def predictions(path: Path) -> list[Prediction]:
    """Returns what follows for uniform ids from a file of `routing`."""
    found = read_routing(path)
    steps = {
        record["chip"]: record
        for record in read_steps(path.with_name(STEPS))["records"]
        if record["case"] == ONE_TABLE and record["error"] is None
    }
    dim = found["config"]["dim"]
    record = next(r for r in found["records"] if r.get("distribution") == "uniform")
    return list(_predictions(record["ids"], record["unique"], dim, steps))


def _predictions(
    ids: int, unique: float, dim: int, steps: dict[str, Any]
) -> Iterator[Prediction]:
    for network in NETWORKS:
        step = steps[network.chip]
        for shape in SHAPES[network.axes]:
            devices = math.prod(shape) * network.devices
            messages = message_bytes(default_quota(ids, devices), devices)
            received = (2 * 4 * dim * unique + messages) / ids
            of_chip = network.devices * received
            yield Prediction(
                network.chip,
                shape,
                network.is_torus(shape),
                received,
                network.ns_into_a_chip(shape, of_chip),
                network.ns_through_the_middle(shape, of_chip),
                hbm=ns_an_id(step, EMBEDDING, "hbm_ns"),
                issue=ns_an_id(step, EMBEDDING, "issue_ns"),
            )


def weak_scaling_table(path: Path) -> Table:
    """One line for each slice: the least nanoseconds of an id, and what is left."""
    header = ["chip", "chips", "slice", "received, bytes an id", "into a chip"]
    header += ["through the middle", "HBM", "instructions", "one after another"]
    header.append("samples/s a chip, of 4 chips")
    lines = []
    first: dict[str, Prediction] = {}
    for each in predictions(path):
        base = first.setdefault(each.chip, each)
        slice_ = "x".join(map(str, each.shape))
        left = base.one_after_another / each.one_after_another
        numbers = (each.into, each.middle, each.hbm, each.issue, each.one_after_another)
        lines.append(
            [
                each.chip,
                f"{each.chips}",
                f"{slice_} {'torus' if each.torus else 'mesh'}",
                f"{each.received:,.0f}",
                *(f"{number:.1f}" for number in numbers),
                f"{left:.0%}",
            ]
        )
    return header, lines


def weak_scaling_figure(path: Path) -> Figure | None:
    """Draws the times of an id on each chip, as chips are added."""
    if not path.with_name(STEPS).exists():
        return None
    found = predictions(path)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(NETWORKS), sharex=True, sharey=True)
    for axes, network in zip(panels, NETWORKS, strict=True):
        own = [each for each in found if each.chip == network.chip]
        chips = [each.chips for each in own]
        curves = (
            ("links between chips", [e.network for e in own], OUR_COLOUR, "o-"),
            ("HBM of the chip", [e.hbm for e in own], INK, "--"),
            ("instructions of the chip", [e.issue for e in own], GREY, "-"),
        )
        for title, values, colour, style in curves:
            axes.plot(chips, values, style, color=colour, label=title)
        _axes_of_panel(axes, network.chip, chips)
    panels[0].set_ylabel("ns for each id of a device")
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=3)
    figure.suptitle(
        "Least time of a routed step, as chips are added at 4,096 ids each",
        weight="bold",
        x=0.01,
        ha="left",
        size=12,
    )
    return figure


def _axes_of_panel(axes: Axes, chip: str, chips: list[int]) -> None:
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks(chips, [str(count) for count in chips])
    axes.minorticks_off()
    axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.grid(axis="y")
    axes.set_title(chip, weight="normal", size=11)
    axes.set_xlabel("chips")
