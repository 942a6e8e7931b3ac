"""Which implementation runs an update, how it is cut: the one place that chooses."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels import chips, cpu, sparsecore, sweep, tensorcore
from sparse_adam.kernels.layout import MAX_DIM
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.ops import xla
from sparse_adam.ops.vmap import over_tables

Config: TypeAlias = tensorcore.Config | sparsecore.Config | sweep.Config


@dataclasses.dataclass(frozen=True, slots=True)
class Implementation:
    """A way to run the update, and its word on what it cannot do."""

    name: str
    update: Callable
    unsupported: Callable[[Problem], str | None]
    native_to: str | None  # the platform that compiles it; None: every one
    elsewhere: str = "interpreted"  # what another platform does with it, if named
    sorts: bool = False  # takes the ids of a batch as they come, with or without a plan
    absent: Callable[[], str | None] = lambda: None  # why it cannot be compiled at all
    config: type[Config] | None = None  # its block sizes, if it has any

    def compiled_on(self, platform: str | None) -> bool:
        """Whether it is compiled there, as far as is known while tracing."""
        return self.native_to is None or (
            self.native_to == platform and self.absent() is None
        )


# The best first. The last one takes whatever the others leave.
IMPLEMENTATIONS = (
    Implementation(
        "sparsecore",
        over_tables(sparsecore.sparsecore_update),
        sparsecore.unsupported,
        "tpu",
        absent=sparsecore.absent,
        config=sparsecore.Config,
    ),
    Implementation(
        "tensorcore",
        over_tables(tensorcore.tensorcore_update),
        tensorcore.unsupported,
        "tpu",
        config=tensorcore.Config,
    ),
    Implementation(
        "sweep",
        over_tables(sweep.sweep_update),
        sweep.unsupported,
        "tpu",
        config=sweep.Config,
    ),
    Implementation(
        "cpu",
        over_tables(cpu.cpu_update),
        cpu.unsupported,
        "cpu",
        elsewhere="refused by XLA",
        sorts=True,
    ),
    Implementation("xla", xla.xla_update, xla.unsupported, None),
)
NAMES = tuple(i.name for i in IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """An implementation, and the block sizes to run it with; None: its own choice."""

    implementation: Implementation
    config: Config | None = None

    def update(self, state: State, batch: Batch, step: Step, problem: Problem) -> State:
        """Runs it."""
        options: dict[str, Any] = {}
        if self.config is not None:
            options["config"] = self.config
        return self.implementation.update(state, batch, step, problem, **options)


class Choices(NamedTuple):
    """What runs where: the platform is known when the program is lowered, not here."""

    on_tpu: Choice
    on_cpu: Choice
    elsewhere: Choice


def choices(
    problem: Problem, implementation: str | None, config: Config | None = None
) -> Choices:
    """Chooses for `problem`: the named implementation, or for None the best.

    A named implementation is taken or refused, never replaced; off the platform that
    compiles it, it runs interpreted or not at all. None takes the first that is
    compiled where the update runs and that supports the problem; but on a TPU the sweep
    before a row kernel, where the batch is large beside the table (`sweep.crossover`).
    A config names the implementation that it belongs to.

    Raises:
        ValueError: the name is unknown, or names one that cannot do the problem.
        TypeError: the config is of another implementation, or none at all.
    """
    if config is not None:
        implementation = _owner(config, implementation)
    if implementation is None:
        able = [i for i in IMPLEMENTATIONS if i.unsupported(problem) is None]

        def best(platform: str | None) -> Choice:
            first = next(i for i in able if i.compiled_on(platform))
            if _crossover(problem, first) <= problem.num_ids / problem.num_rows:
                first = next(i for i in able if i.name == "sweep")
            return Choice(first)

        return Choices(best("tpu"), best("cpu"), best(None))
    if implementation not in NAMES:
        raise ValueError(f"{implementation=} must be None or one of {NAMES}")
    named = IMPLEMENTATIONS[NAMES.index(implementation)]
    reason = named.unsupported(problem)
    if reason is not None:
        able = [i.name for i in IMPLEMENTATIONS if i.unsupported(problem) is None]
        raise ValueError(
            f"{implementation=} cannot run this update: {reason}. "
            f"Pass implementation=None, or one of {able}"
        )
    choice = Choice(named, config)
    return Choices(choice, choice, choice)


def _crossover(problem: Problem, rows: Implementation) -> float:
    """The share N / V from which on the sweep is faster than the row kernel `rows`."""
    if rows.name not in ("sparsecore", "tensorcore") or sweep.unsupported(problem):
        return math.inf
    return sweep.crossover(problem, rows.name)


def _owner(config: Config, implementation: str | None) -> str:
    for one in IMPLEMENTATIONS:
        if one.config is type(config):
            if implementation in (None, one.name):
                return one.name
            raise TypeError(
                f"{config=} is of implementation={one.name!r}, not of "
                f"{implementation=}: pass one of the two"
            )
    raise TypeError(f"{config=} must be the Config of one of the kernels, or None")


def storage(dim: int, asked_for: str | None = None) -> str:
    """Which storage a table is to have: "packed" on a TPU, else "plain".

    On a TPU a packed row is one DMA in and one out instead of three and three, on
    SparseCore one index list instead of three, and any D works. Elsewhere three arrays
    are as good, and users know them.
    """
    if asked_for is None:
        return "packed" if pltpu.is_tpu_device() and dim <= MAX_DIM else "plain"
    if asked_for not in ("plain", "packed"):
        raise ValueError(f"storage={asked_for!r} must be None, 'plain' or 'packed'")
    return asked_for


def explain(
    problem: Problem, implementation: str | None, config: Config | None = None
) -> str:
    """Says in words what `choices` chooses, and each implementation's objection."""
    chosen = choices(problem, implementation, config)
    lines = []
    for where, choice in zip(("tpu", "cpu", "elsewhere"), chosen, strict=True):
        one = choice.implementation
        how = "compiled" if one.compiled_on(where) else one.elsewhere
        lines.append(f"{where}: {one.name}, {how}")
        if where == "tpu":
            lines += [f"  {line}" for line in _details(problem, choice)]
    for one in IMPLEMENTATIONS:
        reason = one.unsupported(problem)
        if reason is None and one.native_to is not None:
            reason = one.absent() or f"compiled on {one.native_to}"
            reason = f"{reason}; elsewhere {one.elsewhere}, if named"
        lines.append(f"  {one.name}: {reason or 'can run this update anywhere'}")
    return "\n".join(lines)


def _details(problem: Problem, choice: Choice) -> list[str]:
    """How a TPU's kernel is cut, and what spoke for it."""
    one, lines = choice.implementation, []
    if one.config is not None and one.absent() is None:
        config = choice.config or one.config.choose(problem)
        memory = f"{config.vmem_bytes(problem):,} bytes of VMEM"
        lines.append(f"{one.name} {config} takes {memory} on {chips.in_scope().name}")
    able = [i for i in IMPLEMENTATIONS if i.unsupported(problem) is None]
    rows = next(i for i in able if i.compiled_on("tpu"))
    share, crossover = problem.num_ids / problem.num_rows, _crossover(problem, rows)
    if crossover < math.inf:
        lines.append(
            f"N / V = {share:.2%}; from {crossover:.0%} on the sweep is faster than "
            f"{rows.name}"
        )
    return lines
