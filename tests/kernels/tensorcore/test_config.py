"""The TensorCore kernel's block sizes, and what it says it cannot do."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import sparse_adam_update
from sparse_adam.kernels import tensorcore
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.layout import MAX_DIM
from sparse_adam.kernels.tensorcore.config import Config
from sparse_adam.kernels.tensorcore.kernel import RowScratch
from sparse_adam.kernels.vmem import groups_of
from tests import cases, helpers
from tests.cases import Case

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)


def problem(dim, num_ids=4096, packed=True, **fields):
    case = Case("", 3, 128, 2)
    found = helpers.spec(case, cases.arrays(case), packed)
    return helpers.changed(found, dim=dim, num_ids=num_ids, **fields)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dim", [1, 3, 64, 100, 128, 129, 768, MAX_DIM])
def test_every_packed_table_fits(dim, dtype, accumulate):
    one = problem(dim, accumulate=accumulate, dtypes=(dtype, dtype, FLOAT32))
    assert tensorcore.unsupported(one) is None
    assert Config.choose(one).vmem_bytes(one) <= VMEM_BUDGET


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(("dim", "packed"), [(16, True), (300, True), (256, False)])
def test_vmem_bytes_are_those_of_the_buffers(dim, packed, accumulate):
    one, config = problem(dim, packed=packed, accumulate=accumulate), Config(64)
    groups = groups_of(one.layout, whole_rows=True, compiled=True)
    shapes = RowScratch.shapes(one, groups, config.rows_per_chunk)
    buffers = [shapes.grads, *shapes.state, *shapes.touched, *shapes.columns]
    exact = sum(4 * int(np.prod(buffer.shape)) for buffer in buffers)
    assert exact <= config.vmem_bytes(one) <= 1.2 * exact


@pytest.mark.parametrize(
    ("dim", "num_ids", "rows"),
    [(128, 65_536, 256), (128, 100, 128), (128, 1, 8), (16, 65_536, 256)],
)
def test_chosen_chunk(dim, num_ids, rows):
    assert Config.choose(problem(dim, num_ids)).rows_per_chunk == rows


def test_a_wider_row_gets_a_smaller_chunk():
    rows = [Config.choose(problem(dim)).rows_per_chunk for dim in (128, 768, MAX_DIM)]
    assert rows[0] > rows[1] > rows[2] >= 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rows_per_chunk": 12}, "rows_per_chunk=12 must be a power of two >= 8"),
        ({"rows_per_chunk": 4}, "rows_per_chunk=4 must be"),
        ({"dma_unroll": 0}, "dma_unroll=0 must be at least 1"),
    ],
)
def test_impossible_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        Config(**fields)


def test_a_chunk_that_does_not_fit_is_refused():
    state, ids, grads, _ = cases.arrays(Case("", 40, 128, 12))
    config = Config(rows_per_chunk=2**14)
    words = r"rows_per_chunk=16384.*needs [\d,]+ bytes.*pass Config\(rows_per_chunk=16,"
    with pytest.raises(ValueError, match=words):
        sparse_adam_update(*state, ids, grads, config=config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lazy": False}, "lazy=False steps every row"),
        ({"packed": False, "dim": 100}, "D=100 is not a multiple of 128"),
        (
            {"packed": False, "dtypes": (FLOAT32, BFLOAT16, FLOAT32)},
            "momenta is bfloat16",
        ),
        ({"packed": False, "dim": 128 * 1000}, "D=128000 is too large"),
    ],
)
def test_unsupported(fields, words):
    reason = tensorcore.unsupported(helpers.changed(problem(128), **fields))
    assert str(reason).startswith(words)


def test_bytes_moved():
    # Of two occurrences of one row: two gradients, the row in and out, ten indices.
    plain = tensorcore.bytes_moved(2, 1, problem(128, packed=False))
    assert plain == 4 * (2 * 128 + 6 * 128 + 10)
    packed = tensorcore.bytes_moved(2, 1, problem(16))
    assert packed == 4 * (2 * 128 + 6 * 128 + 10)


def test_a_plain_row_is_a_group_of_its_own():
    assert problem(256, packed=False).layout.rows_per_group == 1
    assert problem(16).layout.rows_per_group == 8
