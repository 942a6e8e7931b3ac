"""Wall clock of one update: ours beside what people write without us."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sparse_adam import AdamState, bias_corrected_learning_rate, sparse_adam_update
from sparse_adam.kernels import cpu
from sparse_adam.reference import sparse_adam_update as reference_update

RATE = 1e-3
Batch = tuple[jax.Array, jax.Array]  # ids [N], grads [N, D]
Update = Callable[[AdamState, jax.Array, jax.Array], AdamState]


@dataclass(frozen=True)
class Contender:
    """An update to time, and the options of the reference that it must agree with."""

    name: str
    update: Update
    same_as: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """V rows of D lanes, N ids a batch."""

    rows: int
    dim: int
    ids: int


@click.command()
@click.option("--rows", default=1_000_000, help="V, rows of the table.")
@click.option("--dim", default=128, help="D, lanes of a row.")
@click.option("--ids", default=65_536, help="N, ids of a batch.")
@click.option("--rounds", default=10, help="Timed calls of each contender.")
@click.option("--quick", is_flag=True, help="A small shape and few rounds.")
def update(rows: int, dim: int, ids: int, rounds: int, quick: bool) -> None:
    """Time one update on this machine, every contender in turn."""
    if quick:
        rows, dim, ids, rounds = 100_000, 128, 4096, 5
    shape = Shape(rows, dim, ids)
    console = Console()
    contenders = contenders_for(shape)
    for contender in tqdm(contenders, desc="checking against the reference"):
        check(contender, dim)
    times = measure(contenders, shape, rounds)
    console.print(table(contenders, times, shape))
    console.print(
        "Median of interleaved calls, tables donated, compilation apart. A row is one "
        "id of the batch; ids are zipf(1.05), "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}."
    )


def contenders_for(shape: Shape) -> list[Contender]:
    """Ours first. The interpreted kernel is here for its values, not its speed."""

    def ours(implementation: str) -> Update:
        def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
            return sparse_adam_update(
                *state, ids, grads, learning_rate=RATE, implementation=implementation
            )

        return update

    compiled = jax.default_backend() == "tpu"
    kernel = "tensorcore" if compiled else "tensorcore (interpreted)"
    on_cpu = jax.default_backend() == "cpu" and cpu.LIBRARY.exists()
    everyone = [
        *([Contender("sparse_adam, cpu", ours("cpu"))] if on_cpu else []),
        Contender("sparse_adam, xla", ours("xla")),
        Contender(f"sparse_adam, {kernel}", ours("tensorcore")),
        Contender("plain JAX, .at[].set", at_set_adam),
        Contender(
            "optax.adam, dense",
            dense_optax_adam,
            same_as={
                "lazy_adam": False,
                "sum_inside_sqrt": False,
                # Its first step, with its epsilon as the paper's "epsilon hat".
                "learning_rate": float(bias_corrected_learning_rate(RATE, 1)),
                "epsilon": 1e-7 * (1 - 0.999) ** 0.5,
            },
        ),
    ]
    too_slow = not compiled and shape.ids > 8192
    return [c for c in everyone if "interpreted" not in c.name or not too_slow]


def at_set_adam(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
    """Sparse Adam as people write it: unique, segment sum, three gathers and sets."""
    rows, run = jnp.unique(
        ids, return_inverse=True, size=ids.size, fill_value=state.table.shape[0]
    )
    grad = jax.ops.segment_sum(grads, run.reshape(-1), num_segments=ids.size)
    m = 0.9 * state.momenta[rows] + 0.1 * grad
    v = 0.999 * state.velocities[rows] + 0.001 * grad * grad
    w = state.table[rows] - RATE * m / jnp.sqrt(v + 1e-14)
    return AdamState(
        state.table.at[rows].set(w, mode="drop"),
        state.momenta.at[rows].set(m, mode="drop"),
        state.velocities.at[rows].set(v, mode="drop"),
    )


def dense_optax_adam(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
    """What `jax.grad` of a lookup and an optax optimizer do: everything of size V."""
    grad = jnp.zeros((state.table.shape[0], grads.shape[1])).at[ids].add(grads)
    optimizer = optax.scale_by_adam(eps=1e-7)
    slots = optax.ScaleByAdamState(
        jnp.zeros((), jnp.int32), state.momenta, state.velocities
    )
    step, new = optimizer.update(grad, slots)
    _, momenta, velocities = jax.tree.leaves(new)
    return AdamState(state.table - RATE * jnp.asarray(step), momenta, velocities)


def make_batch(shape: Shape, seed: int) -> Batch:
    """Zipf(1.05) ids over shuffled rows, and normal gradients."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, shape.rows + 1) ** 1.05
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(shape.ids))
    ids = np.random.default_rng(0).permutation(shape.rows)[ranks]
    grads = rng.standard_normal((shape.ids, shape.dim), np.float32)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(grads)


def make_state(shape: Shape) -> AdamState:
    """Random weights and zero slots."""
    key, size = jax.random.key(0), (shape.rows, shape.dim)
    zeros = jnp.zeros(size)
    return AdamState(jax.random.normal(key, size), zeros, zeros + 0)


def check(contender: Contender, dim: int) -> None:
    """Refuse to time a contender whose numbers are not the reference's."""
    shape = Shape(rows=500, dim=dim, ids=200)
    state, (ids, grads) = make_state(shape), make_batch(shape, seed=1)
    options = {"learning_rate": RATE} | contender.same_as
    arrays = map(np.asarray, (*state, ids, grads))
    for got, want in zip(
        contender.update(state, ids, grads),
        reference_update(*arrays, **options),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, want, rtol=2e-4, atol=1e-6, err_msg=contender.name
        )


def measure(
    contenders: list[Contender], shape: Shape, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call. Round robin, so that a slow moment hits everyone."""
    batches = [make_batch(shape, seed) for seed in range(4)]
    running = {}
    for contender in tqdm(contenders, desc="compiling"):
        state = make_state(shape)
        step = jax.jit(contender.update, donate_argnums=0).lower(state, *batches[0])
        running[contender.name] = (step.compile(), state)
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in tqdm(range(rounds + 1), desc="timing"):
        for name, (step, state) in running.items():
            start = time.perf_counter()
            state = jax.block_until_ready(step(state, *batches[turn % len(batches)]))
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
            running[name] = (step, state)
    return times


def table(
    contenders: list[Contender], times: dict[str, list[float]], shape: Shape
) -> Table:
    """One line a contender: median, spread, rows a second, ratio to the first."""
    title = f"One update: V = {shape.rows:,}, D = {shape.dim}, N = {shape.ids:,}"
    columns = ("update", "ms, median", "p20", "p80", "rows / s", "time / first")
    result = Table(*columns, title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    first = np.median(times[contenders[0].name])
    for contender in contenders:
        p20, p50, p80 = np.percentile(times[contender.name], (20, 50, 80))
        result.add_row(
            contender.name,
            *(f"{1e3 * t:.2f}" for t in (p50, p20, p80)),
            f"{shape.ids / p50:,.0f}",
            f"{p50 / first:.2f}",
        )
    return result
