"""The order of waits and DMAs, chunk by chunk: a slot is filled only when it is free.

An interpreter that makes a DMA when it is waited for cannot see a wait that comes too
late, and its race detector takes DMAs that one core began as ordered. So the programs
run here step by step in Python, with what moves and computes replaced by a record of
its calls.
"""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sparse_adam.kernels.sparsecore import pipeline
from sparse_adam.kernels.sparsecore.config import SLOTS as ROW_SLOTS
from sparse_adam.kernels.sparsecore.config import WORD_SLOTS
from sparse_adam.kernels.sweep import kernel as sweep
from sparse_adam.kernels.sweep.config import STATE_SLOTS
from sparse_adam.kernels.tensorcore import kernel as tensorcore
from sparse_adam.kernels.tensorcore.config import SLOTS


@dataclasses.dataclass
class Slot:
    """A slot's content: nothing, or a number that is on its way in, there, or out."""

    number: int | None = None
    stage: str = "free"

    def moves(self, number: int, before: str, after: str) -> None:
        """Takes the next stage, if the slot is at the one before."""
        if before == "free":
            assert self.stage == "free", f"{number} comes while {self} is there"
        else:
            assert (self.number, self.stage) == (number, before)
        self.number, self.stage = number, after


def step_by_step(monkeypatch: Any, module: Any) -> None:
    """Makes branches and loops of a program those of Python."""

    def when(condition: Any) -> Any:
        return lambda body: body() if condition else None

    def fori_loop(low: Any, high: Any, body: Any, carry: Any) -> Any:
        for i in range(int(low), int(high)):
            carry = body(jnp.int32(i), carry)
        return carry

    monkeypatch.setattr(pl, "when", when)
    monkeypatch.setattr(module.lax, "fori_loop", fori_loop)


def on_grid(monkeypatch: Any, run: Any, cores: int, steps: int) -> None:
    """Runs the grid steps of a kernel one after the other."""
    monkeypatch.setattr(pl, "num_programs", lambda axis: steps)
    for core in range(cores):
        for step in range(steps):
            monkeypatch.setattr(
                pl, "program_id", lambda axis, at=(core, step): jnp.int32(at[axis])
            )
            run()


@pytest.mark.parametrize("units", [0, 1, 2, 3, 4, 9])
def test_slots_of_a_subcore(monkeypatch, units):
    words = [Slot() for _ in range(WORD_SLOTS)]
    rows = [Slot() for _ in range(ROW_SLOTS)]

    class Recorded:
        """What `Pipeline.run` asks of a pipeline."""

        scratch = SimpleNamespace(opened=np.zeros(0))
        records = SimpleNamespace(blocks=1, width=8)
        config = SimpleNamespace(lanes=8)

        def _share(self):
            return SimpleNamespace(chunks=units)

        def _unit(self, number):
            return int(number)

        def announce(self, unit, share):
            words[unit % WORD_SLOTS].moves(unit, "free", "arriving")

        def fetch(self, unit, share):
            words[unit % WORD_SLOTS].moves(unit, "arriving", "used")
            rows[unit % ROW_SLOTS].moves(unit, "free", "arriving")

        def finish(self, unit, share):
            rows[unit % ROW_SLOTS].moves(unit, "arriving", "leaving")

        def leave(self, unit, share):
            rows[unit % ROW_SLOTS].moves(unit, "leaving", "free")
            words[unit % WORD_SLOTS].moves(unit, "used", "free")
            left.append(unit)

    left: list[int] = []
    step_by_step(monkeypatch, pipeline)
    run: Any = pipeline.Pipeline.run
    run(Recorded())
    assert left == list(range(units))
    assert {slot.stage for slot in (*words, *rows)} == {"free"}


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("bounds", [(0, 0), (0, 1), (0, 3), (0, 9), (0, 5, 11)])
def test_slots_of_the_tensorcore(monkeypatch, bounds, accumulate):
    slots = [Slot() for _ in range(SLOTS)]
    left: list[int] = []

    def fetch(work, arriving, grads, state, slot, these):
        slots[slot].moves(these, "free", "arriving")

    def wait(work, semaphores, slot, these):
        if semaphores == "arrived":
            slots[slot].moves(these, "arriving", "there")
        else:
            slots[slot].moves(these, "leaving", "free")
            left.append(these)

    def write_back(work, finishing, state, slot, these):
        slots[slot].moves(these, "there", "leaving")

    class Number(int):
        """The number of a chunk, which is also all that it moves."""

        count = first = written = property(lambda self: self)

        def __sub__(self, other):
            return self

    step_by_step(monkeypatch, tensorcore)
    monkeypatch.setattr(tensorcore, "_fetch", fetch)
    monkeypatch.setattr(tensorcore, "_wait", wait)
    monkeypatch.setattr(tensorcore, "_write_back", write_back)
    for name in ("_take_gradients", "_sum", "_update", "_step"):
        monkeypatch.setattr(tensorcore, name, lambda *args: None)
    given: Any = SimpleNamespace
    work = given(moved=lambda chunk: Number(int(chunk)))
    monkeypatch.setattr(tensorcore, "_ChunkWork", lambda *args: work)
    scratch = given(state_arrived="arrived", state_left="left")
    spec = given(accumulate=accumulate)
    kernel: Any = inspect.unwrap(tensorcore.kernel)
    steps = max(np.diff(bounds)) + 1

    def run() -> None:
        empty: Any = [None] * 7
        kernel(jnp.array(bounds), *empty, scratch, spec=spec, groups=None, config=None)

    on_grid(monkeypatch, run, len(bounds) - 1, int(steps))
    assert left == list(range(bounds[-1]))
    assert {slot.stage for slot in slots} == {"free"}


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 9])
def test_slots_of_the_sweep(monkeypatch, blocks, cores):
    slots = [Slot() for _ in range(STATE_SLOTS)]
    stages = {
        ("in", "_start"): ("free", "arriving"),
        ("in", "_wait"): ("arriving", "there"),
        ("out", "_start"): ("there", "leaving"),
        ("out", "_wait"): ("leaving", "free"),
    }
    left: list[int] = []

    def move(of, state, scratch, block, do, *, arrives):
        assert arrives == (state == "in")
        before, after = stages[state, do.__name__]
        slots[block % STATE_SLOTS].moves(int(block), before, after)
        if after == "free":
            left.append(int(block))

    step_by_step(monkeypatch, sweep)
    monkeypatch.setattr(sweep, "_move", move)
    for name in ("_add_gradients", "_update", "_forget", "_fetch_indices"):
        monkeypatch.setattr(sweep, name, lambda *args: None)
    each = -(-blocks // cores)
    given: Any = SimpleNamespace
    of = given(
        blocks_each=each,
        num_blocks=blocks,
        config=given(occurrences_per_chunk=16),
    )
    scalars = given(firsts=jnp.zeros(cores, int), ends=jnp.ones(cores, int))
    kernel: Any = inspect.unwrap(sweep.kernel)
    scratch = given(sums=None, place=[0, 0])

    def run() -> None:
        kernel(scalars, given(), given(), "in", "out", scratch, sweep=of)

    on_grid(monkeypatch, run, cores, each + 1)
    assert left == list(range(blocks))
    assert {slot.stage for slot in slots} == {"free"}
