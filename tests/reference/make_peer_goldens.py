"""Runs the optimizers of torch, FBGEMM and TensorFlow and writes what they computed.

The tests read `peer_goldens.json`, so that they need none of the three. To make it
anew:

    pip install '.[peers,parity]'
    python -m tests.reference.make_peer_goldens [torch] [fbgemm] [tensorflow]

torch and TensorFlow compute in float64 here; FBGEMM has float32 only. A row that is not
in a batch has no gradient there, so each row is a parameter of its own for torch.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("peer_goldens.json")
RATE = 0.125
NUM_ROWS, DIM = 5, 4
Arrays = list[np.ndarray]  # the table, then its slots
Batch = tuple[np.ndarray, np.ndarray]  # ids and gradients


def inputs() -> tuple[np.ndarray, list[Batch]]:
    """Returns a table, and batches in which ids repeat and row 4 never occurs."""
    rng = np.random.default_rng(12)
    table = rng.integers(-32, 33, (NUM_ROWS, DIM)) / 16
    batches = []
    for ids in ([0, 3, 0, 1], [3, 2], [1, 1, 1, 0], [2, 3, 0]):
        odd = 2 * rng.integers(-24, 24, (len(ids), DIM)) + 1
        batches.append((np.array(ids), odd / 16))
    return table, batches


def summed(batch: Batch) -> dict[int, np.ndarray]:
    """Returns the summed gradient of each row that is in the batch."""
    ids, grads = batch
    return {int(row): grads[ids == row].sum(axis=0) for row in np.unique(ids)}


def run_torch(
    optimizer: str, slots: Sequence[str], options: Mapping[str, Any]
) -> list[Arrays]:
    """Returns the arrays after each batch, of an optimizer of `torch.optim`."""
    torch = importlib.import_module("torch")
    table, batches = inputs()
    rows = [torch.nn.Parameter(torch.tensor(row)) for row in table]
    made = getattr(torch.optim, optimizer)(rows, lr=RATE, foreach=False, **options)

    def slot(row: Any, name: str) -> np.ndarray:
        # Before the first gradient of a row there is no slot but in Adagrad.
        shape = () if name == "step" else DIM
        return made.state[row].get(name, torch.zeros(shape)).numpy().copy()

    states = []
    for batch in batches:
        made.zero_grad(set_to_none=True)
        for row, gradient in summed(batch).items():
            rows[row].grad = torch.tensor(gradient)
        made.step()
        weights = np.stack([row.detach().numpy().copy() for row in rows])
        own = [np.stack([slot(row, name) for row in rows]) for name in slots]
        states.append([weights, *own])
    return states


def run_fbgemm(optimizer: str, initial: float, epsilon: float) -> list[Arrays]:
    """Returns the arrays after each batch, of FBGEMM's table on a CPU."""
    torch = importlib.import_module("torch")
    package = "fbgemm_gpu.split_table_batched_embeddings_ops"
    training = importlib.import_module(f"{package}_training")
    host = importlib.import_module(f"{package}_common").EmbeddingLocation.HOST
    table, batches = inputs()
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_ROWS, DIM, host, training.ComputeDevice.CPU)],
        optimizer=getattr(training.OptimType, optimizer),
        learning_rate=RATE,
        eps=epsilon,
        stochastic_rounding=False,
    )

    def arrays() -> list[Any]:
        (slots,) = bags.split_optimizer_states()
        if isinstance(slots, list | tuple):
            (slots,) = slots
        return [bags.split_embedding_weights()[0].detach(), slots]

    weights, sums = arrays()
    weights.copy_(torch.tensor(table))
    sums.fill_(initial)
    states = []
    for ids, grads in batches:
        output = bags(torch.tensor(ids), torch.arange(len(ids) + 1))
        output.backward(torch.tensor(grads, dtype=torch.float32))
        states.append([x.numpy().copy() for x in arrays()])
    return states


def run_tensorflow_ftrl(
    power: float, l1: float, l2: float, beta: float, initial: float, multiply: bool
) -> list[Arrays]:
    """Returns the arrays after each batch, of TensorFlow's operation on a CPU."""
    tf = importlib.import_module("tensorflow")
    table, batches = inputs()
    state = [table, np.full(table.shape, initial), np.zeros(table.shape)]
    var, accum, linear = variables = [tf.Variable(x) for x in state]
    states = []
    for batch in batches:
        rows = summed(batch)
        tf.raw_ops.ResourceSparseApplyFtrlV2(
            var=var.handle,
            accum=accum.handle,
            linear=linear.handle,
            grad=tf.constant(np.stack(list(rows.values()))),
            indices=tf.constant(list(rows)),
            lr=tf.constant(RATE, tf.float64),
            l1=tf.constant(l1, tf.float64),
            # As Keras does it: the operation has no beta of its own.
            l2=tf.constant(l2 + beta / (2 * RATE), tf.float64),
            l2_shrinkage=tf.constant(0, tf.float64),
            lr_power=tf.constant(power, tf.float64),
            multiply_linear_by_lr=multiply,
        )
        states.append([x.numpy().copy() for x in variables])
    return states


ADAM_SLOTS = ("exp_avg", "exp_avg_sq", "step")
AMSGRAD_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
CASES: dict[str, Callable[[], list[Arrays]]] = {
    "torch_sgd": lambda: run_torch("SGD", (), {}),
    "torch_adagrad": lambda: run_torch(
        "Adagrad", ("sum",), {"initial_accumulator_value": 0.25, "eps": 0.0}
    ),
    "torch_rmsprop": lambda: run_torch(
        "RMSprop",
        ("square_avg", "momentum_buffer"),
        {"alpha": 0.75, "momentum": 0.5, "eps": 0.0},
    ),
    "torch_adam": lambda: run_torch(
        "Adam", ADAM_SLOTS, {"betas": (0.5, 0.75), "eps": 0.0}
    ),
    "torch_adam_defaults": lambda: run_torch("Adam", ADAM_SLOTS, {"eps": 0.0}),
    "torch_adamw": lambda: run_torch(
        "AdamW", ADAM_SLOTS, {"betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.5}
    ),
    "torch_adam_epsilon": lambda: run_torch(
        "Adam", ADAM_SLOTS, {"betas": (0.5, 0.75), "eps": 0.25}
    ),
    "torch_amsgrad": lambda: run_torch(
        "Adam", AMSGRAD_SLOTS, {"betas": (0.5, 0.25), "eps": 0.25, "amsgrad": True}
    ),
    "torch_adamw_amsgrad": lambda: run_torch(
        "AdamW", AMSGRAD_SLOTS, {"eps": 1e-8, "weight_decay": 0.01, "amsgrad": True}
    ),
    "fbgemm_adagrad": lambda: run_fbgemm("EXACT_ADAGRAD", 0.25, 0.0),
    "fbgemm_row_wise_adagrad": lambda: run_fbgemm("EXACT_ROWWISE_ADAGRAD", 0.0, 1e-8),
    "fbgemm_row_wise_adagrad_epsilon": lambda: run_fbgemm(
        "EXACT_ROWWISE_ADAGRAD", 0.25, 0.5
    ),
    "tensorflow_ftrl": lambda: run_tensorflow_ftrl(-0.5, 0, 0, 0, 0.25, False),
    "tensorflow_ftrl_all": lambda: run_tensorflow_ftrl(
        -0.75, 0.5, 0.25, 0.125, 0.5, False
    ),
    "tensorflow_ftrl_multiplied": lambda: run_tensorflow_ftrl(
        -0.5, 4.0, 0.25, 0.125, 0.25, True
    ),
}


def rounded(array: np.ndarray) -> Any:
    """Returns nested lists of numbers with the digits that float32 needs, and one."""
    return np.vectorize(lambda x: float(f"{x:.10g}"))(array).tolist()


def main(peers: Sequence[str]) -> None:
    """Computes the cases of these peers, or all, and writes them into the file."""
    table, batches = inputs()
    goldens: Any = json.loads(FILE.read_text()) if FILE.exists() else {"cases": {}}
    goldens["learning_rate"] = RATE
    goldens["table"] = table.tolist()
    goldens["batches"] = [
        {"ids": ids.tolist(), "grads": grads.tolist()} for ids, grads in batches
    ]
    for name, run in CASES.items():
        if not peers or name.split("_")[0] in peers:
            goldens["cases"][name] = [[rounded(x) for x in s] for s in run()]
    FILE.write_text(json.dumps(goldens) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
