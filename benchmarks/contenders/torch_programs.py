"""Contenders in PyTorch; it need not be installed to read this file."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders.base import plain_only
from benchmarks.workload import RATE, Rows, TimedBatch, Workload
from sparse_adam import bias_corrected_learning_rate
from sparse_adam.reference import sparse_adam_update as reference_update

EPSILON = 1e-8  # torch's and FBGEMM's


def import_torch() -> Any:
    """Late, and past the type checker; with as many threads as there are cores."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def _states(workload: Workload) -> list[list[Any]]:
    """Tables and slots that the contenders in PyTorch share."""
    torch = import_torch()

    def state() -> list[Any]:
        return [torch.from_numpy(x) for x in workload.first_state()]

    if "torch" not in workload.shared:
        workload.shared["torch"] = [state() for _ in range(workload.copies)]
    return workload.shared["torch"]


class Torch:
    """An update in place of the shared tables; there is nothing to compile."""

    compile_seconds = 0.0

    def __init__(self, workload: Workload) -> None:
        self._torch = import_torch()
        self._states = _states(workload)
        self._batches = [
            (
                self._torch.from_numpy(ids.astype(np.int64)),
                self._torch.from_numpy(grads),
            )
            for ids, grads in workload.batches
        ]
        self._num_rows = workload.case.num_rows

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Rows of table, momenta and velocities."""
        return tuple(x.numpy()[rows] for x in self._states[turn % len(self._states)])


class SparseAdam(Torch):
    """`torch.optim.SparseAdam.step` alone, its gradient ready as autograd leaves it.

    The gradient is not coalesced: that is the first thing the step does.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        torch = self._torch
        size = (workload.case.num_rows, workload.case.dim)
        self._gradients = [
            torch.sparse_coo_tensor(ids[None], grads, size, check_invariants=False)
            for ids, grads in self._batches
        ]
        self._optimizers = [self._optimizer(state) for state in self._states]

    def _optimizer(self, state: list[Any]) -> tuple[Any, Any]:
        weights = self._torch.nn.Parameter(state[0])
        optimizer = self._torch.optim.SparseAdam([weights], lr=RATE, eps=EPSILON)
        optimizer.state[weights] = {
            "step": 0,
            "exp_avg": state[1],
            "exp_avg_sq": state[2],
        }
        return weights, optimizer

    def step(self, turn: int) -> Callable[[], Any]:
        """The optimizer's step."""
        weights, optimizer = self._optimizers[turn % len(self._optimizers)]
        weights.grad = self._gradients[turn % len(self._gradients)]
        return optimizer.step


class RowAdam(Torch):
    """Sparse Adam by hand: unique, `index_add_`, three gathers and three writes."""

    def step(self, turn: int) -> Callable[[], Any]:
        """The update, in the formula of our own."""
        table, momenta, velocities = self._states[turn % len(self._states)]
        ids, grads = self._batches[turn % len(self._batches)]
        torch, num_rows = self._torch, self._num_rows

        def run() -> None:
            rows, run_of = torch.unique(ids, return_inverse=True)
            grad = torch.zeros((len(rows), grads.shape[1]))
            grad.index_add_(0, run_of, grads)
            inside = (rows >= 0) & (rows < num_rows)
            if not inside.all():
                rows, grad = rows[inside], grad[inside]
            m = momenta[rows].lerp_(grad, 0.1)
            v = velocities[rows].mul_(0.999).addcmul_(grad, grad, value=0.001)
            w = table[rows].addcdiv_(m, (v + 1e-14).sqrt_(), value=-RATE)
            momenta.index_copy_(0, rows, m)
            velocities.index_copy_(0, rows, v)
            table.index_copy_(0, rows, w)

        return run


class TorchCopy:
    """torch's parallel copy."""

    compile_seconds = 0.0

    def __init__(self, size: int) -> None:
        torch = import_torch()
        self._source, self._target = torch.ones(size // 4), torch.zeros(size // 4)

    def step(self, turn: int) -> Callable[[], Any]:
        """One copy of the whole."""
        del turn
        return lambda: self._target.copy_(self._source)

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Nothing is updated."""
        del turn, rows
        return ()


class Fbgemm:
    """The backward pass of FBGEMM's table-batched embedding, which updates the rows.

    It has no Adam on a CPU ("Optimizer adam is not supported in CPU mode"); this is its
    Adagrad. Bags hold one id each; the forward pass is outside the clock.
    """

    compile_seconds = 0.0

    def __init__(self, optimizer: str, workload: Workload) -> None:
        self._torch = torch = import_torch()
        ops = importlib.import_module(
            "fbgemm_gpu.split_table_batched_embeddings_ops_training"
        )
        common = importlib.import_module(
            "fbgemm_gpu.split_table_batched_embeddings_ops_common"
        )
        case, host = workload.case, common.EmbeddingLocation.HOST
        self._tables = [
            ops.SplitTableBatchedEmbeddingBagsCodegen(
                [(case.num_rows, case.dim, host, ops.ComputeDevice.CPU)],
                optimizer=getattr(ops.OptimType, optimizer),
                learning_rate=RATE,
                eps=EPSILON,
                pooling_mode=common.PoolingMode.SUM,
            )
            for _ in range(workload.copies)
        ]
        weights, *_ = workload.first_state()
        for table in self._tables:
            table.split_embedding_weights()[0].copy_(torch.from_numpy(weights))
        self._offsets = torch.arange(case.num_ids + 1)
        self._batches = [
            (torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(grads))
            for ids, grads in workload.batches
        ]

    def step(self, turn: int) -> Callable[[], Any]:
        """Looks up, and returns the backward pass."""
        table = self._tables[turn % len(self._tables)]
        ids, grads = self._batches[turn % len(self._batches)]
        output = table(ids, self._offsets)
        return lambda: output.backward(grads)

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Rows of the table and of the sums of squares."""
        table = self._tables[turn % len(self._tables)]
        slots = table.split_optimizer_states()[0]
        (weights,) = table.split_embedding_weights()
        sums = slots[0] if isinstance(slots, list | tuple) else slots
        return weights.detach().numpy()[rows], np.array(sums.numpy()[rows])


def no_padding(case: Case) -> str | None:
    """torch's and FBGEMM's CPU code takes an id of -1 for an error, or worse."""
    if case.distribution == "padded":
        return "takes no padding: an id of -1 is an error, or worse"
    return plain_only(case)


def sparse_adam(rows: Rows, batch: TimedBatch, case: Case) -> Rows:
    """Lazy Adam with bias correction, and epsilon beside the root."""
    del case
    w, m, v = rows
    return reference_update(
        *(w, m, v, *batch),
        learning_rate=float(bias_corrected_learning_rate(RATE, 1)),
        epsilon=EPSILON,
        sum_inside_sqrt=False,
    )


def adagrad(rows: Rows, batch: TimedBatch, case: Case, *, by_row: bool) -> Rows:
    """Adagrad on summed gradients, with a sum of squares for a weight or for a row."""
    del case
    w, sums = (x.astype(np.float64) for x in rows)
    grad = np.zeros(w.shape)
    inside = batch.ids >= 0
    np.add.at(grad, batch.ids[inside], batch.grads[inside].astype(np.float64))
    if by_row:
        sums = sums + np.mean(grad**2, axis=1)
        return w - RATE * grad / (np.sqrt(sums) + EPSILON)[:, None], sums
    sums = sums + grad**2
    return w - RATE * grad / (np.sqrt(sums) + EPSILON), sums
