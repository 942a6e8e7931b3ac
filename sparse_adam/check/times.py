"""Times of updates on this machine, beside what bounds them from below.

On a TPU the bound is static: what the compiled program issues and moves for each id,
by `python -m benchmarks static`, kept in `bounds.json`. On a CPU the update is timed
beside a copy of as many bytes.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels import chips
from sparse_adam.kernels.cpu.update import bytes_moved
from sparse_adam.ops import dispatch
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.sparse_adam import (
    AdamState,
    packed_adam_update,
    sparse_adam_update,
)

BOUNDS = Path(__file__).with_name("bounds.json")
ROUNDS = 5
# In flight together: a TPU must not wait for the host between two.
CALLS = {"tpu": 10, "cpu": 2}
# Of `bounds.json`: which program stands for an implementation and a storage.
PROGRAMS = {
    ("xla", "plain"): "xla_sorted",
    **{
        (name, storage): f"{'packed_' * (storage == 'packed')}{name}"
        for name in ("sparsecore", "tensorcore", "sweep")
        for storage in ("plain", "packed")
    },
}


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """One update, timed.

    Attributes:
        name: of what was timed.
        microseconds: of one call, the median.
        bound: microseconds that it takes at least, or that a copy takes; None where
            nothing is known.
        limit: what sets the bound.
        error: why there is no time; empty where there is.
    """

    name: str
    microseconds: float = 0.0
    bound: float | None = None
    limit: str = ""
    error: str = ""

    def __str__(self) -> str:
        """Returns a line for the report: the time of a call, beside its bound."""
        if self.error:
            return f"{self.name:<22} raised {self.error}"
        line = f"{self.name:<22} {self.microseconds:>10,.1f} us"
        if self.bound is None:
            return f"{line}, no bound"
        times = self.microseconds / self.bound
        return f"{line}, {times:.1f} times {self.bound:,.1f} us of {self.limit}"


def static_bounds() -> dict[str, Any]:
    """Returns what `python -m benchmarks bounds` has written."""
    return json.loads(BOUNDS.read_text())


def timings(platform: str, quick: bool) -> Iterator[Timing]:
    """Yields the time of each implementation that is compiled here, in each storage."""
    bounds = static_bounds()
    rows, dim, ids = (bounds[name] for name in ("rows", "dim", "ids"))
    if platform != "tpu" and quick:
        rows, ids = 100_000, 8192
    copied = _copy(bytes_moved(ids, ids, dim)) if platform == "cpu" else None
    chip = chips.in_scope().name
    for one in dispatch.IMPLEMENTATIONS:
        if not one.compiled_on(platform):
            continue
        for storage in ("plain", "packed"):
            name = f"{one.name} {storage}"
            least, limit = None, ""
            if platform == "tpu":
                program = PROGRAMS.get((one.name, storage), "")
                found = bounds["programs"].get(program, {}).get(chip)
                if found is not None:
                    least, limit = found["ns"] * ids / 1e3, f"{found['limit']} ({chip})"
            elif platform == "cpu":
                least, limit = copied, "copying its bytes on one thread"
            calls = CALLS.get(platform, 2)
            try:
                seconds = _update(one.name, storage, rows, dim, ids, calls)
            except Exception as error:
                yield Timing(name, error=f"{type(error).__name__}: {error}")
            else:
                yield Timing(name, 1e6 * seconds, least, limit)


def _update(
    implementation: str, storage: str, rows: int, dim: int, ids: int, calls: int
) -> float:
    """Returns the seconds of an update of distinct ids, with a plan made before."""
    rng = np.random.default_rng(0)
    drawn = rng.permutation(rows)[:ids].astype(np.int32)
    order = np.argsort(drawn).astype(np.int32)
    # Made here, since a sort takes long to compile for some TPUs.
    plan = UpdatePlan(jnp.asarray(drawn[order]), jnp.asarray(order), rows)
    batch = (jnp.asarray(drawn), jnp.ones((ids, dim)), plan)

    def initial() -> Any:
        arrays = [jnp.full((rows, dim), x) for x in (1.0, 0.0, 0.0)]
        return PackedTable.pack(*arrays) if storage == "packed" else AdamState(*arrays)

    def update(state: Any, batch: Any) -> Any:
        ids, grads, plan = batch
        options: Any = {"plan": plan, "implementation": implementation}
        if storage == "packed":
            return packed_adam_update(state, ids, grads, **options)
        table, momenta, velocities = state
        return sparse_adam_update(table, momenta, velocities, ids, grads, **options)

    state = jax.jit(initial)()
    step = jax.jit(update, donate_argnums=0)

    def many() -> None:
        nonlocal state
        for _ in range(calls):
            state = step(state, batch)
        jax.block_until_ready(state)

    state = jax.block_until_ready(step(state, batch))
    return _median(many) / calls


def _copy(size: int) -> float:
    """Returns the microseconds in which NumPy reads and writes `size` bytes in all."""
    source = np.ones(size // 8, np.float32)
    target = np.zeros_like(source)
    return 1e6 * _median(lambda: np.copyto(target, source))


def _median(call: Callable[[], None]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
