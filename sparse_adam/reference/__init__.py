"""How we know: the update in NumPy and float64, slow and obvious."""

from sparse_adam.reference.sparse_adam import (
    sparse_adam_update as sparse_adam_update,
)
