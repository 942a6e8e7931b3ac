"""What XLA says of a compiled program, and how often it compiled one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from tests.xla_flags import HAS_OLD_EMITTER


def as_for_users(lowered: Lowered) -> Compiled:
    """Compiles with the emitter of fusions that `conftest.py` leaves out.

    With it XLA has other fusions, and scatters in place. A test that asks for the text
    or the memory of a CPU's program asks for that of users.
    """
    options: Any = {"xla_cpu_use_fusion_emitters": True} if HAS_OLD_EMITTER else None
    return lowered.compile(compiler_options=options)


def text(program: Compiled) -> str:
    """Its instructions."""
    found = program.as_text()
    assert found is not None
    return found


def memory(program: Compiled) -> Any:
    """The bytes of its arguments, results and temporaries, as XLA names them."""
    return program.memory_analysis()


def flops(program: Compiled) -> float:
    """The operations that XLA counts in it."""
    found: Any = program.cost_analysis()
    return found["flops"]


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Gives a list that gets the seconds of each compilation in the block."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
