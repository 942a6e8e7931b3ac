"""Contenders in JAX: sparse_adam, and what people write without it."""

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders.base import Running
from benchmarks.workload import RATE, Rows, TimedBatch, Workload
from sparse_adam import AdamState, bias_corrected_learning_rate, sparse_adam_update
from sparse_adam._types import ImplementationName
from sparse_adam.reference import sparse_adam_update as reference_update

Update = Callable[[Any, jax.Array, jax.Array], Any]


class States:
    """States that the contenders in JAX share, since each updates them in place."""

    def __init__(self, workload: Workload, pack: Callable[[AdamState], Any]) -> None:
        self._make = lambda: pack(AdamState(*map(jnp.array, workload.first_state())))
        self._states: list[Any] = [None] * workload.copies

    def take(self, turn: int) -> Any:
        """The state of a turn, gone until it is put back: an update donates it."""
        at = turn % len(self._states)
        state, self._states[at] = self._states[at], None
        return self._make() if state is None else state

    def put(self, turn: int, state: Any) -> None:
        """Its successor."""
        self._states[turn % len(self._states)] = state


class Jitted:
    """A jitted update with its state donated."""

    def __init__(self, update: Update, workload: Workload, states: States) -> None:
        self._states = states
        self._batches = [tuple(map(jnp.asarray, batch)) for batch in workload.batches]
        state = states.take(0)
        began = time.perf_counter()
        lowered = jax.jit(update, donate_argnums=0).lower(state, *self._batches[0])
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        states.put(0, state)

    def step(self, turn: int) -> Callable[[], Any]:
        """One update, waited for."""
        batch = self._batches[turn % len(self._batches)]
        state = self._states.take(turn)

        def run() -> None:
            new = jax.block_until_ready(self._compiled(state, *batch))
            self._states.put(turn, new)

        return run

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Rows of table, momenta and velocities."""
        state = self._states.take(turn)
        self._states.put(turn, state)
        return tuple(np.asarray(x[rows]) for x in state)


def start(update: Callable[[Case], Update], workload: Workload) -> Running:
    """Compiles an update of the plain tables, which all contenders in JAX share."""
    if "jax" not in workload.shared:
        workload.shared["jax"] = States(workload, lambda state: state)
    return Jitted(update(workload.case), workload, workload.shared["jax"])


class Packed(Jitted):
    """An update of a `PackedTable`, by the best implementation that there is."""

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Rows of table, momenta and velocities."""
        table = self._states.take(turn)
        self._states.put(turn, table)
        return tuple(np.asarray(x[rows]) for x in table.unpack())


def start_packed(workload: Workload) -> Running:
    """Compiles an update of packed tables."""
    from sparse_adam import PackedTable, packed_adam_update

    options = workload.case.options

    def update(table: PackedTable, ids: jax.Array, grads: jax.Array) -> PackedTable:
        return packed_adam_update(table, ids, grads, learning_rate=RATE, **options)

    states = States(workload, lambda state: PackedTable.pack(*state))
    return Packed(update, workload, states)


def ours(implementation: ImplementationName | None, case: Case) -> Update:
    """`sparse_adam_update`, with the options of the case."""

    def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
        return sparse_adam_update(
            *state,
            ids,
            grads,
            learning_rate=RATE,
            implementation=implementation,
            **case.options,
        )

    return update


def ours_unsupported(implementation: ImplementationName, case: Case) -> str | None:
    """Its own objection; and that an interpreted kernel is not worth a clock."""
    platform = {"cpu": "cpu", "xla": None}.get(implementation, "tpu")
    if platform not in (None, jax.default_backend()):
        return f"compiled for a {platform.upper()} only, and this is none"
    rows, batch = (case.num_rows, case.dim), (case.num_ids, case.dim)
    *state, grads = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(name))
        for shape, name in zip((rows, rows, rows, batch), case.dtypes, strict=True)
    )
    ids = jax.ShapeDtypeStruct((case.num_ids,), jnp.int32)
    try:
        jax.eval_shape(ours(implementation, case), state, ids, grads)
    except ValueError as error:
        return str(error)
    return None


def at_set(case: Case) -> Update:
    """Sparse Adam as people write it: unique, segment sum, three gathers and sets."""

    def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
        # Padding becomes V; negative ids would count from the end.
        ids = jnp.where(ids < 0, case.num_rows, ids)
        rows, run = jnp.unique(
            ids, return_inverse=True, size=ids.size, fill_value=case.num_rows
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

    return update


def dense_gradient(case: Case, ids: jax.Array, grads: jax.Array) -> jax.Array:
    """What `jax.grad` of a lookup is: an array of the table's size."""
    ids = jnp.where(ids < 0, case.num_rows, ids)
    zeros = jnp.zeros((case.num_rows, case.dim), grads.dtype)
    return zeros.at[ids].add(grads, mode="drop")


def dense_unsupported(case: Case) -> str | None:
    """They know neither bfloat16 slots nor our options, and update every row."""
    if set(case.options) - {"lazy_adam"}:
        return f"written without {', '.join(case.options)}"
    return None if set(case.dtypes) == {"float32"} else "written for float32"


def optax_dense(case: Case) -> Update:
    """`optax.adam` on a gradient of the table's size."""
    optax = importlib.import_module("optax")
    optimizer = optax.scale_by_adam(eps=1e-7)

    def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
        grad = dense_gradient(case, ids, grads)
        slots = optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), state.momenta, state.velocities
        )
        step, (_, momenta, velocities) = optimizer.update(grad, slots)
        return AdamState(state.table - RATE * step, momenta, velocities)

    return update


def keras_dense(case: Case) -> Update:
    """`keras.optimizers.Adam`; with JAX it is given gradients of the table's size."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"KERAS_BACKEND is {keras.backend.backend()}, not jax")
    optimizer = keras.optimizers.Adam(RATE, epsilon=1e-7)
    optimizer.build([keras.Variable(jnp.zeros((case.num_rows, case.dim)))])

    def update(state: AdamState, ids: jax.Array, grads: jax.Array) -> AdamState:
        grad = dense_gradient(case, ids, grads)
        counted = [jnp.zeros((), jnp.int32), jnp.asarray(RATE, jnp.float32)]
        (table,), slots = optimizer.stateless_apply(
            [*counted, state.momenta, state.velocities], [grad], [state.table]
        )
        return AdamState(table, *slots[2:4])

    return update


def dense_adam(rows: Rows, batch: TimedBatch, case: Case) -> Rows:
    """The first step of Adam with bias correction, on every row."""
    del case
    rate = float(bias_corrected_learning_rate(RATE, 1))
    w, m, v = rows
    return reference_update(
        *(w, m, v, *batch),
        learning_rate=rate,
        lazy_adam=False,
        sum_inside_sqrt=False,
        epsilon=1e-7 * (1 - 0.999) ** 0.5,  # it is added to the corrected root
    )


def keras_adam(rows: Rows, batch: TimedBatch, case: Case) -> Rows:
    """The same, with Keras's epsilon: added to the root before its correction."""
    del case
    w, m, v = rows
    return reference_update(
        *(w, m, v, *batch),
        learning_rate=float(bias_corrected_learning_rate(RATE, 1)),
        lazy_adam=False,
        sum_inside_sqrt=False,
        epsilon=1e-7,
    )
