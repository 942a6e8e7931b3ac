"""What the optimizers of torch, FBGEMM and TensorFlow computed, and rules that match.

`reference/make_peer_goldens.py` ran them and wrote the numbers.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_adam.embedding import AdamW
from sparse_adam.reference import (
    RowStep,
    adagrad,
    adagrad_momentum,
    adam,
    ftrl,
    row_wise_adagrad,
    sgd,
)
from sparse_adam.rules import (
    AdagradMomentumRule,
    AdagradRule,
    AdamRule,
    FTRLRule,
    RowWiseAdagradRule,
    SGDRule,
    UpdateRule,
)

FILE = Path(__file__).parent / "reference" / "peer_goldens.json"
GOLDENS = json.loads(FILE.read_text())
ROW_ADAM = {"sum_inside_sqrt": False, "bias_correction": "row", "epsilon": 1e-30}
EXACT_BETAS = {"beta_1": 0.5, "beta_2": 0.75, **ROW_ADAM}
CORRECTED = {"epsilon": 0.25, "epsilon_hat": False}
AMSGRAD = EXACT_BETAS | CORRECTED | {"beta_2": 0.25, "amsgrad": True}
ALL: dict[str, Any] = {
    "l1_regularization_strength": 0.5,
    "l2_regularization_strength": 0.25,
    "beta": 0.125,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """An optimizer of another package, and what it must equal.

    Attributes:
        name: of the case in the file.
        rule: makes the same steps.
        step: makes them in the reference.
        initial: what each slot begins with.
        rtol: of what the peer computed, relative to the largest number in an array.
        options: of the update.
    """

    name: str
    rule: UpdateRule
    step: RowStep
    initial: tuple[float, ...] = ()
    rtol: float = 1e-9  # float64, and ten digits in the file
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def check(self, update: Callable[..., Any], dtype: Any, rtol: float = 0.0) -> None:
        """Makes the peer's steps by `update(state, ids, grads, **options)`.

        Args:
            update: returns the new table and slots; slots per row are `[V]`.
            dtype: of the arrays that it is given.
            rtol: allowed in addition to the peer's own.
        """
        expected = GOLDENS["cases"][self.name]
        table = np.asarray(GOLDENS["table"], dtype)
        shapes = [np.shape(x) for x in expected[0][1:]]
        slots = [np.full(*x) for x in zip(shapes, self.initial, strict=True)]
        state = (table, *(x.astype(dtype) for x in slots))
        options = {"learning_rate": GOLDENS["learning_rate"], **self.options}
        for number, (batch, arrays) in enumerate(
            zip(GOLDENS["batches"], expected, strict=True), start=1
        ):
            grads = np.asarray(batch["grads"], dtype)
            state = update(state, np.asarray(batch["ids"]), grads, **options)
            for index, (got, wanted) in enumerate(zip(state, arrays, strict=True)):
                np.testing.assert_allclose(
                    np.asarray(got, np.float64),
                    wanted,
                    rtol=0,
                    atol=(self.rtol + rtol) * np.abs(wanted).max() + 1e-300,
                    err_msg=f"array {index} after batch {number}",
                )


PEERS = (
    Peer("torch_sgd", SGDRule(), sgd()),
    Peer("torch_adagrad", AdagradRule(0.25), adagrad(), (0.25,)),
    # Without its epsilon, RMSprop with momentum is Adagrad's with decay.
    Peer(
        "torch_rmsprop",
        AdagradMomentumRule(momentum=0.5, beta2=0.75, epsilon=1e-30),
        adagrad_momentum(momentum=0.5, beta2=0.75, epsilon=1e-30),
        (0.0, 0.0),
    ),
    Peer("torch_adam", AdamRule(**EXACT_BETAS), adam(**EXACT_BETAS), (0.0, 0.0, 0.0)),
    Peer(
        "torch_adam_defaults",
        AdamRule(**ROW_ADAM),
        adam(**ROW_ADAM),
        (0.0, 0.0, 0.0),
        2e-5,  # 1 - beta_2 is formed in float32 here
    ),
    Peer(
        "torch_adamw",
        AdamRule(**EXACT_BETAS),
        adam(**EXACT_BETAS),
        (0.0, 0.0, 0.0),
        options={
            "weight_decay_factor": 0.5,
            "multiply_weight_decay_factor_by_learning_rate": True,
        },
    ),
    Peer(
        "torch_adam_epsilon",
        AdamRule(**(EXACT_BETAS | CORRECTED)),
        adam(**(EXACT_BETAS | CORRECTED)),
        (0.0, 0.0, 0.0),
    ),
    Peer(
        "torch_amsgrad",
        AdamRule(**AMSGRAD),
        adam(**AMSGRAD),
        (0.0, 0.0, 0.0, 0.0),
    ),
    Peer(
        "torch_adamw_amsgrad",
        AdamW(amsgrad=True).rule,
        adam(**(ROW_ADAM | {"epsilon": 1e-8, "epsilon_hat": False, "amsgrad": True})),
        (0.0, 0.0, 0.0, 0.0),
        2e-5,  # 1 - beta_2 is formed in float32 here
        options={
            "weight_decay_factor": 0.01,
            "multiply_weight_decay_factor_by_learning_rate": True,
        },
    ),
    Peer("fbgemm_adagrad", AdagradRule(0.25), adagrad(), (0.25,), 2e-7),
    Peer(
        "fbgemm_row_wise_adagrad",
        RowWiseAdagradRule(),
        row_wise_adagrad(),
        (0.0,),
        2e-7,
    ),
    Peer(
        "fbgemm_row_wise_adagrad_epsilon",
        RowWiseAdagradRule(0.5, 0.25),
        row_wise_adagrad(0.5),
        (0.25,),
        2e-7,
    ),
    Peer("tensorflow_ftrl", FTRLRule(), ftrl(), (0.25, 0.0)),
    Peer(
        "tensorflow_ftrl_all",
        FTRLRule(-0.75, **ALL, initial_accumulator_value=0.5),
        ftrl(-0.75, **ALL),
        (0.5, 0.0),
    ),
    Peer(
        "tensorflow_ftrl_multiplied",
        FTRLRule(
            **(ALL | {"l1_regularization_strength": 4.0}),
            multiply_linear_by_learning_rate=True,
        ),
        ftrl(
            **(ALL | {"l1_regularization_strength": 4.0}),
            multiply_linear_by_learning_rate=True,
        ),
        (0.25, 0.0),
    ),
)
