"""Every way to run an update: an implementation, and the storage it works on."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from sparse_adam import AdamState, PackedTable, packed_adam_update, sparse_adam_update
from sparse_adam._types import ImplementationName
from sparse_adam.ops import dispatch
from tests import cases, helpers
from tests.cases import Case


def through_packed_table(
    table: Any, momenta: Any, velocities: Any, ids: Any, grads: Any, **options: Any
) -> AdamState:
    """`sparse_adam_update` of arrays that are packed before, and unpacked after."""
    packed = PackedTable.pack(table, momenta, velocities)
    return AdamState(*packed_adam_update(packed, ids, grads, **options).unpack())


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """One of them. `dim` is a width that shows its difficulties."""

    storage: str
    implementation: ImplementationName
    dim: int

    def __str__(self) -> str:
        return f"{self.storage}-{self.implementation}"

    def __call__(self, *arrays: Any, **options: Any) -> AdamState:
        """Updates `table, momenta, velocities` by `ids, grads`."""
        update = sparse_adam_update
        if self.storage == "packed":
            update = through_packed_table
        return update(*arrays, implementation=self.implementation, **options)

    def supports(self, case: Case) -> bool:
        """Whether the implementation says that it can do the case."""
        return helpers.supports(
            self.implementation,
            case,
            cases.arrays(case),
            packed=self.storage == "packed",
        )

    def arrays(self, distribution: str = "uniform", **fields: Any) -> cases.Arrays:
        """A case of 24 ids and 40 rows of this way's width."""
        case = Case("", 40, self.dim, 24, distribution)
        return cases.arrays(dataclasses.replace(case, **fields))

    def inexact(
        self, distribution: str = "uniform", **fields: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The same with gradients whose sums are rounded."""
        state, ids, grads, _ = self.arrays(distribution, **fields)
        rng = np.random.default_rng(0)
        return *state, ids, rng.standard_normal(grads.shape).astype(np.float32)


# In packed storage four rows of 32 lanes share lines.
ALL = tuple(
    way
    for storage, dim in (("plain", 128), ("packed", 32))
    for way in (Way(storage, name, dim) for name in dispatch.NAMES)
)
# Interpreted kernels take seconds to compile each shape. The sweep, and packed storage
# on SparseCore, are held to the same things by tests of their own in `tests/kernels`.
CONTRACT = tuple(
    way
    for way in ALL
    if way.implementation in ("tensorcore", "cpu", "xla")
    or str(way) == "plain-sparsecore"
)
LAZY = tuple(way for way in CONTRACT if way.supports(Case("", 40, way.dim, 24)))

each_way = pytest.mark.parametrize("way", LAZY, ids=str)


def examples(way: Way) -> int:
    """How many cases hypothesis is to draw: each of them compiles."""
    return 20 if way.implementation in ("cpu", "xla") else 5
