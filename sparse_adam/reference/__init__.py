"""The update in NumPy and float64, slow and obvious: what the tests compare with."""

from sparse_adam.reference.catch_up import caught_up as caught_up
from sparse_adam.reference.sparse_adam import (
    sparse_adam_update as sparse_adam_update,
)
from sparse_adam.reference.steps import adagrad as adagrad
from sparse_adam.reference.steps import adagrad_momentum as adagrad_momentum
from sparse_adam.reference.steps import adam as adam
from sparse_adam.reference.steps import ftrl as ftrl
from sparse_adam.reference.steps import row_wise_adagrad as row_wise_adagrad
from sparse_adam.reference.steps import sgd as sgd
from sparse_adam.reference.update import RowStep as RowStep
from sparse_adam.reference.update import WithEMA as WithEMA
from sparse_adam.reference.update import sparse_update as sparse_update
