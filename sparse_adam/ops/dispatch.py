"""Which implementation runs an update, and where: the one place that chooses.

What can be known while tracing is decided here, once: the implementation for each
platform, whether it is compiled or interpreted there, and its block sizes. Which
platform it is, is known when the program is lowered (`late`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from sparse_adam._types import ImplementationName, Storage
from sparse_adam.kernels import chips, cpu, sparsecore, sweep, tensorcore
from sparse_adam.kernels.layout import MAX_DIM
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.ops import xla
from sparse_adam.ops.late import PLATFORMS

Config: TypeAlias = tensorcore.Config | sparsecore.Config | sweep.Config


@dataclasses.dataclass(frozen=True, slots=True)
class Implementation:
    """A way to run the update, and its word on what it cannot do.

    Attributes:
        name: as users say it.
        update: `update(state, batch, scalars, spec)`; with `config` and `interpret`
            where it has block sizes.
        unsupported: says why it cannot do an update, or returns None.
        native_to: the platform that compiles it; None is every one.
        elsewhere: what another platform does with it, if it is named.
        sorts: whether it takes the ids of a batch as they come.
        absent: says why it cannot be compiled at all, or returns None.
        config: the class of its block sizes, if it has any.
    """

    name: ImplementationName
    update: Callable[..., State]
    unsupported: Callable[[UpdateSpec], str | None]
    native_to: str | None
    elsewhere: str = "interpreted"
    sorts: bool = False
    absent: Callable[[], str | None] = lambda: None
    config: type[Config] | None = None

    def compiled_on(self, platform: str | None) -> bool:
        """Tells whether it is compiled there, as far as is known while tracing."""
        return self.native_to is None or (
            self.native_to == platform and self.absent() is None
        )


# The best first. The last one takes whatever the others leave.
IMPLEMENTATIONS = (
    Implementation(
        "sparsecore",
        sparsecore.sparsecore_update,
        sparsecore.unsupported,
        "tpu",
        absent=sparsecore.absent,
        config=sparsecore.Config,
    ),
    Implementation(
        "tensorcore",
        tensorcore.tensorcore_update,
        tensorcore.unsupported,
        "tpu",
        config=tensorcore.Config,
    ),
    Implementation(
        "sweep",
        sweep.sweep_update,
        sweep.unsupported,
        "tpu",
        config=sweep.Config,
    ),
    Implementation(
        "cpu",
        cpu.cpu_update,
        cpu.unsupported,
        "cpu",
        elsewhere="refused by XLA",
        sorts=True,
    ),
    Implementation("xla", xla.xla_update, xla.unsupported, None),
)
NAMES: tuple[ImplementationName, ...] = tuple(i.name for i in IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """An implementation on one platform.

    Attributes:
        implementation: what runs.
        interpret: whether a Pallas kernel is interpreted there.
        config: its block sizes; None leaves them to an interpreted kernel, or to one
            that has none.
        given: whether a user gave them.
        named: whether a user named the implementation.
    """

    implementation: Implementation
    interpret: bool
    config: Config | None
    given: bool
    named: bool

    @classmethod
    def on(
        cls,
        platform: str | None,
        implementation: Implementation,
        spec: UpdateSpec,
        config: Config | None,
        *,
        named: bool,
    ) -> "Choice":
        """Decides how an implementation runs an update on a platform."""
        compiled = implementation.compiled_on(platform)
        given = config is not None
        if config is None and implementation.config is not None and compiled:
            config = implementation.config.choose(spec)
        return cls(implementation, not compiled, config, given, named)

    def update(
        self, state: State, batch: SortedBatch, scalars: StepScalars, spec: UpdateSpec
    ) -> State:
        """Runs the update."""
        options: dict[str, Any] = {}
        if self.implementation.config is not None:
            options = {"config": self.config, "interpret": self.interpret}
        return self.implementation.update(state, batch, scalars, spec, **options)


class Choices(NamedTuple):
    """What runs where: the platform is known when the program is lowered, not here."""

    on_tpu: Choice
    on_cpu: Choice
    elsewhere: Choice

    def on(self, platform: str | None) -> Choice:
        """Returns the choice for a platform."""
        if platform not in PLATFORMS:
            return self.elsewhere
        return self[PLATFORMS.index(platform)]

    def for_spec(self, spec: UpdateSpec) -> "Choices":
        """Returns the same implementations, with block sizes for another update."""
        return Choices(
            *(
                Choice.on(
                    platform,
                    one.implementation,
                    spec,
                    one.config if one.given else None,
                    named=one.named,
                )
                for platform, one in zip((*PLATFORMS, None), self, strict=True)
            )
        )

    def for_part(self, spec: UpdateSpec) -> "Choices":
        """Returns what runs where one device has a part of the rows: this update.

        What the user named stays; else the best is chosen again, with fewer rows.
        """
        if any(one.named for one in self):
            return self.for_spec(spec)
        return choices(spec, None)


def choices(
    spec: UpdateSpec, implementation: str | None, config: Config | None = None
) -> Choices:
    """Chooses for an update: the named implementation, or for None the best.

    A named implementation is taken or refused, never replaced; off the platform that
    compiles it, it runs interpreted or not at all. None takes the first that is
    compiled where the update runs and that supports it; but on a TPU the sweep before a
    row kernel, where the batch is large beside the table (`sweep.crossover`). A config
    names the implementation that it belongs to.

    Raises:
        ValueError: the name is unknown, or names one that cannot do the update; the
            config does not fit the TPU in scope.
        TypeError: the config is of another implementation, or none at all.
    """
    if config is not None:
        implementation = _owner(config, implementation)
    if implementation is None:
        able = _able(spec)

        def best(platform: str | None) -> Choice:
            first = next(i for i in able if i.compiled_on(platform))
            if _crossover(spec, first) <= spec.num_ids / spec.num_rows:
                first = next(i for i in able if i.name == "sweep")
            return Choice.on(platform, first, spec, None, named=False)

        return Choices(*map(best, (*PLATFORMS, None)))
    if implementation not in NAMES:
        raise ValueError(f"{implementation=} must be None or one of {NAMES}")
    named = IMPLEMENTATIONS[NAMES.index(implementation)]
    reason = named.unsupported(spec)
    if reason is not None:
        raise ValueError(
            f"{implementation=} cannot run this update: {reason}. "
            f"Pass implementation=None, or one of {[i.name for i in _able(spec)]}"
        )
    if config is not None and named.absent() is None:
        config.check(spec)
    return Choices(
        *(
            Choice.on(platform, named, spec, config, named=True)
            for platform in (*PLATFORMS, None)
        )
    )


def _able(spec: UpdateSpec) -> list[Implementation]:
    return [i for i in IMPLEMENTATIONS if i.unsupported(spec) is None]


def _crossover(spec: UpdateSpec, rows: Implementation) -> float:
    """Returns the share N / V from which on the sweep is faster than a row kernel."""
    if rows.name not in ("sparsecore", "tensorcore") or sweep.unsupported(spec):
        return math.inf
    return sweep.crossover(spec, rows.name)


def _owner(config: Config, implementation: str | None) -> ImplementationName:
    for one in IMPLEMENTATIONS:
        if one.config is type(config):
            if implementation in (None, one.name):
                return one.name
            raise TypeError(
                f"{config=} is of implementation={one.name!r}, not of "
                f"{implementation=}: pass one of the two"
            )
    raise TypeError(f"{config=} must be the Config of one of the kernels, or None")


def storage(dim: int, asked_for: str | None = None) -> Storage:
    """Returns which storage a table is to have: "packed" on a TPU, else "plain".

    On a TensorCore a packed row is one DMA in and one out instead of three and three,
    and on a TPU any D works. Elsewhere plain arrays are as good, and users know them.

    Raises:
        ValueError: another storage is asked for.
    """
    if asked_for is None:
        on_tpu = chips.in_scope() is not chips.UNKNOWN
        return "packed" if on_tpu and dim <= MAX_DIM else "plain"
    if asked_for == "plain" or asked_for == "packed":
        return asked_for
    raise ValueError(f"storage={asked_for!r} must be None, 'plain' or 'packed'")


def explain(spec: UpdateSpec, chosen: Choices, here: str) -> str:
    """Says in words what was chosen, and each implementation's objection.

    Args:
        spec: of the update.
        chosen: what runs where.
        here: the platform that leads.
    """
    parts = {}
    for where, choice in zip((*PLATFORMS, "elsewhere"), chosen, strict=True):
        one = choice.implementation
        how = one.elsewhere if choice.interpret else "compiled"
        parts[where] = [f"{where}: {one.name}, {how}"]
        if where == "tpu":
            parts[where] += [f"  {line}" for line in _details(spec, choice)]
    first, *details = parts.pop(here if here in PLATFORMS else "elsewhere")
    _, what = first.split(": ")
    lines = [f"here, on {here}: {what}", *details]
    lines += [line for part in parts.values() for line in part]
    for one in IMPLEMENTATIONS:
        reason = one.unsupported(spec)
        if reason is None and one.native_to is not None:
            reason = one.absent() or f"compiled on {one.native_to}"
            reason = f"{reason}; elsewhere {one.elsewhere}, if named"
        lines.append(f"  {one.name}: {reason or 'can run this update anywhere'}")
    return "\n".join(lines)


def _details(spec: UpdateSpec, choice: Choice) -> list[str]:
    """Says how a TPU's kernel is cut, and what spoke for it."""
    one, lines = choice.implementation, []
    if choice.config is not None:
        memory = f"{choice.config.vmem_bytes(spec):,} bytes of VMEM"
        chip = chips.in_scope().name
        lines.append(f"{one.name} {choice.config} takes {memory} on {chip}")
    rows = next(i for i in _able(spec) if i.compiled_on("tpu"))
    share, crossover = spec.num_ids / spec.num_rows, _crossover(spec, rows)
    if crossover < math.inf:
        lines.append(
            f"N / V = {share:.2%}; from {crossover:.0%} on the sweep is faster than "
            f"{rows.name}"
        )
    return lines
