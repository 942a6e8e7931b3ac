"""Wall clock on a CPU: ours beside `torch.optim.SparseAdam` and a plain copy.

Everything runs in one process and in turn, round after round, so that a slow moment
hits everyone; ratios are taken within a round. `torch` is no dependency: install it to
run this.
"""

import importlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.update import RATE
from sparse_adam import AdamState, bias_corrected_learning_rate, sparse_adam_update
from sparse_adam.kernels.cpu import bytes_moved
from sparse_adam.reference import sparse_adam_update as reference_update

RESULTS = Path(__file__).parent / "results" / "peers.json"
BATCHES = 4  # different ones, in turn
COPIED = 2**29  # bytes of the copy
REST = 0.02  # seconds in which the threads of the one before cease to spin
EPSILON = 1e-8  # torch's
OURS = "sparse_adam, cpu"
XLA = "sparse_adam, xla"
TORCH = "torch.optim.SparseAdam"
COPY = "copy"
Step = Callable[[int], Any]  # does round i, and waits for it


@dataclass(frozen=True)
class Shape:
    """V rows of D lanes, N ids a batch, drawn zipf(1.05) or uniformly."""

    rows: int
    dim: int
    ids: int
    distribution: str


SUITE = (
    *(
        Shape(1_000_000, dim, ids, distribution)
        for dim in (128, 64, 16)
        for ids in (65_536, 1024)
        for distribution in ("zipf", "uniform")
    ),
    # Flat in V, linear in N.
    *(Shape(rows, 16, 65_536, "uniform") for rows in (100_000, 10_000_000)),
    *(Shape(1_000_000, 16, ids, "uniform") for ids in (16_384, 262_144)),
)


@click.command()
@click.option("--rounds", default=15, help="Timed rounds of each shape.")
@click.option("--only", default="", help="Shapes whose description contains this.")
@click.option("--save", is_flag=True, help=f"Write {RESULTS.name}.")
def peers(rounds: int, only: str, save: bool) -> None:
    """Time one update on a CPU beside torch's."""
    check_torch()
    console, lines = Console(width=100), []
    before = os.getloadavg()[0]
    for shape in tqdm([s for s in SUITE if only in str(s)], desc="shapes"):
        lines.append(measure(shape, rounds))
    console.print(table(lines))
    machine = describe_machine() | {"load_before": before, "load": os.getloadavg()[0]}
    console.print(machine)
    if save:
        results = {"machine": machine, "rounds": rounds, "lines": lines}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Times all contenders; one line of the results."""
    batches = [make_batch(shape, seed) for seed in range(BATCHES)]
    steps = {
        OURS: ours("cpu", shape, batches),
        XLA: ours("xla", shape, batches),
        TORCH: torch_sparse_adam(shape, batches),
        COPY: copy(),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            time.sleep(REST)
            start = time.perf_counter()
            step(turn)
            if turn > 1:  # the first rounds compile and warm up
                times[name].append(time.perf_counter() - start)
    unique = float(np.mean([len(np.unique(ids)) for ids, _ in batches]))
    least = bytes_moved(shape.ids, round(unique), shape.dim)
    rates = {OURS: least, COPY: 2 * COPIED}
    ratios = {
        name: float(np.median(np.divide(times[name], times[OURS])))
        for name in (XLA, TORCH)
    }
    share = np.divide(least, times[OURS]) / np.divide(2 * COPIED, times[COPY])
    return {
        **asdict(shape),
        "unique": unique,
        "ms": {n: [1e3 * p for p in percentiles(t)] for n, t in times.items()},
        "gb_per_s": {n: b / 1e9 / np.median(times[n]) for n, b in rates.items()},
        "ratio": ratios,
        "share_of_copy": float(np.median(share)),
    }


def percentiles(times: list[float]) -> list[float]:
    """Median, 20th and 80th percentile, and the least, which load spoils last."""
    return [float(p) for p in np.percentile(times, (50, 20, 80, 0))]


def ours(implementation: str, shape: Shape, batches: list[Any]) -> Step:
    """An update of donated tables."""

    def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
        return sparse_adam_update(
            *state, ids, grads, learning_rate=RATE, implementation=implementation
        )

    step = jax.jit(update, donate_argnums=0)
    on_device = [(jnp.asarray(ids, jnp.int32), jnp.asarray(g)) for ids, g in batches]
    tables = [jnp.full((shape.rows, shape.dim), x) for x in (1.0, 0.0, 0.0)]
    states = [AdamState(*tables)]

    def run(turn: int) -> None:
        state = states.pop()
        states.append(jax.block_until_ready(step(state, *on_device[turn % BATCHES])))

    return run


def torch_sparse_adam(shape: Shape, batches: list[Any]) -> Step:
    """`step` alone: its gradients are ready, as autograd leaves them."""
    torch = import_torch()
    weights = torch.nn.Parameter(torch.ones(shape.rows, shape.dim))
    optimizer = torch.optim.SparseAdam([weights], lr=RATE, eps=EPSILON)
    gradients = [coo_gradient(ids, grads, shape.rows) for ids, grads in batches]

    def step(turn: int) -> None:
        weights.grad = gradients[turn % BATCHES]
        optimizer.step()

    return step


def coo_gradient(ids: np.ndarray, grads: np.ndarray, rows: int) -> Any:
    """The gradient of a lookup, not coalesced."""
    torch = import_torch()
    indices, values = torch.from_numpy(ids)[None], torch.from_numpy(grads)
    size = (rows, grads.shape[1])
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=False)


def copy() -> Step:
    """What the machine does at best: torch's parallel copy of a large array."""
    torch = import_torch()
    source = torch.ones(COPIED // 4)
    target = torch.zeros(COPIED // 4)
    return lambda turn: target.copy_(source)


def make_batch(shape: Shape, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and normal gradients; hot rows are scattered over the table."""
    rng = np.random.default_rng(seed)
    if shape.distribution == "uniform":
        ids = rng.integers(0, shape.rows, shape.ids)
    else:
        share = np.cumsum(np.arange(1, shape.rows + 1) ** -1.05)
        ranks = np.searchsorted(share / share[-1], rng.random(shape.ids))
        ids = np.random.default_rng(0).permutation(shape.rows)[ranks]
    return ids, rng.standard_normal((shape.ids, shape.dim), np.float32)


def check_torch() -> None:
    """Refuse to compare with other numbers: one step of torch's is one of ours."""
    torch = import_torch()
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    ids, grads = rng.integers(0, 50, 200), rng.standard_normal((200, 8), np.float32)
    weights = torch.nn.Parameter(torch.ones(50, 8))
    weights.grad = coo_gradient(ids, grads, rows=50)
    torch.optim.SparseAdam([weights], lr=RATE, eps=EPSILON).step()
    zeros = np.zeros((50, 8), np.float32)
    expected, _, _ = reference_update(
        *(zeros + 1, zeros, zeros, ids, grads),
        learning_rate=np.asarray(bias_corrected_learning_rate(RATE, 1)),
        epsilon=EPSILON,
        sum_inside_sqrt=False,
    )
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-5)


def import_torch() -> Any:
    """Late, and past the type checker: `torch` need not be installed."""
    return importlib.import_module("torch")


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    torch = import_torch()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "torch": torch.__version__,
    }


def table(lines: list[dict[str, Any]]) -> Table:
    """One line a shape: milliseconds, then what they are worth."""
    columns = ("V", "D", "N", "ids", "ms", "torch", "xla", "of copy")
    best = ("least ms", "torch", "xla", "of copy")
    title = (
        "One update on this CPU: medians, then least times; others as ratios to ours"
    )
    result = Table(*columns, *best, title=title)
    for column in result.columns:
        column.justify = "right"
    for line in lines:
        least = {name: ms[3] for name, ms in line["ms"].items()}
        share = line["gb_per_s"][OURS] * line["ms"][OURS][0] / least[OURS]
        share /= line["gb_per_s"][COPY] * line["ms"][COPY][0] / least[COPY]
        result.add_row(
            *(f"{line[key]:,}" for key in ("rows", "dim", "ids")),
            line["distribution"],
            f"{line['ms'][OURS][0]:.2f}",
            *(f"{line['ratio'][name]:.1f}" for name in (TORCH, XLA)),
            f"{line['share_of_copy']:.0%}",
            f"{least[OURS]:.2f}",
            *(f"{least[name] / least[OURS]:.1f}" for name in (TORCH, XLA)),
            f"{share:.0%}",
        )
    return result
