"""Which implementation runs an update: the one place that chooses."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from sparse_adam.kernels import cpu, sparsecore, sparsecore_config, tensorcore
from sparse_adam.kernels.problem import Problem
from sparse_adam.ops import xla
from sparse_adam.ops.vmap import over_tables


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
        absent=sparsecore_config.absent,
    ),
    Implementation(
        "tensorcore",
        over_tables(tensorcore.tensorcore_update),
        tensorcore.unsupported,
        "tpu",
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


class Choices(NamedTuple):
    """What runs where: the platform is known when the program is lowered, not here."""

    on_tpu: Implementation
    on_cpu: Implementation
    elsewhere: Implementation


def choices(problem: Problem, implementation: str | None) -> Choices:
    """Chooses for `problem`: the named implementation, or for None the best.

    A named implementation is taken or refused, never replaced; off the platform that
    compiles it, it runs interpreted or not at all. None takes the first that is
    compiled where the update runs and that supports the problem.

    Raises:
        ValueError: the name is unknown, or names one that cannot do the problem.
    """
    if implementation is None:
        able = [i for i in IMPLEMENTATIONS if i.unsupported(problem) is None]

        def best(platform: str | None) -> Implementation:
            return next(i for i in able if i.compiled_on(platform))

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
    return Choices(named, named, named)


def explain(problem: Problem, implementation: str | None) -> str:
    """Says in words what `choices` chooses, and each implementation's objection."""
    chosen = choices(problem, implementation)
    lines = []
    for where, one in zip(("tpu", "cpu", "elsewhere"), chosen, strict=True):
        how = "compiled" if one.compiled_on(where) else one.elsewhere
        lines.append(f"{where}: {one.name}, {how}")
    for one in IMPLEMENTATIONS:
        reason = one.unsupported(problem)
        if reason is None and one.native_to is not None:
            reason = one.absent() or f"compiled on {one.native_to}"
            reason = f"{reason}; elsewhere {one.elsewhere}, if named"
        lines.append(f"  {one.name}: {reason or 'can run this update anywhere'}")
    return "\n".join(lines)
