"""The sweep in the interpreter that models a TPU's memories and DMAs.

The plain interpreter runs a DMA at its start and so cannot see a missing wait, a buffer
read too early or two DMAs that race. Blocks and chunks are tiny here.
"""

import dataclasses

import numpy as np
import pytest

from sparse_adam.kernels.sweep import Config, sweep_update, update
from tests import cases, helpers
from tests.cases import BFLOAT16, Case
from tests.kernels import row_kernels

SMALL = Config(groups_per_block=16, occurrences_per_chunk=16, unroll=16)
ROLLED = Config(groups_per_block=16, occurrences_per_chunk=32, unroll=3)


def check(run, case, ids=None, config=SMALL, packed=False):
    row_kernels.check_kernel(sweep_update, run, case, ids, config, packed)


# More blocks than slots, the last one not full; more chunks than slots.
@pytest.mark.parametrize("config", [SMALL, ROLLED])
def test_more_blocks_and_chunks_than_slots(run_in_tpu_interpreter, config):
    check(run_in_tpu_interpreter, Case("", 70, 128, 70, "distinct"), config=config)


@pytest.mark.parametrize("distribution", ["equal", "padded"])
def test_distributions(run_in_tpu_interpreter, distribution):
    check(run_in_tpu_interpreter, Case("", 40, 128, 40, distribution))


def test_no_valid_id(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, Case("", 40, 128, 20), np.full(20, -1))


# Five blocks: three of one core, two of the other, whose ids begin within a batch.
@pytest.mark.parametrize(
    "ids",
    [
        np.arange(70),
        np.full(70, 5),
        np.full(70, 69),
        [*range(40), *[47, 48] * 15],
        [-1] * 70,
    ],
    ids=["distinct", "all of the first", "all of the second", "around", "none"],
)
def test_two_cores(run_on_two_cores, ids):
    config = dataclasses.replace(SMALL, cores=2)
    check(run_on_two_cores, Case("", 70, 128, 70), np.asarray(ids), config)


def test_one_block_for_two_cores(run_on_two_cores):
    config = dataclasses.replace(SMALL, cores=2)
    check(run_on_two_cores, Case("", 10, 16, 1), [3], config, packed=True)


def test_every_row(run_in_tpu_interpreter):
    case = Case("", 40, 128, 0, options={"lazy_adam": False})
    arrays = cases.arrays(case)
    new, expected = row_kernels.run_kernel(
        sweep_update, run_in_tpu_interpreter, arrays, case, SMALL
    )
    rate = row_kernels.RATE
    helpers.assert_close_states(new, arrays.state, expected, learning_rate=rate)


def test_wide_weighted_bfloat16(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, Case("", 20, 256, 20, "zipf", BFLOAT16, True))


@pytest.mark.parametrize(("dim", "num_rows"), [(16, 300), (64, 70), (200, 20)])
def test_packed(run_in_tpu_interpreter, dim, num_rows):
    case = Case("", num_rows, dim, 40, "zipf")
    check(run_in_tpu_interpreter, case, packed=True)


# Three tiles of a block in one iteration and one for the rest; then of three lines, in
# blocks of one tile, two and one.
@pytest.mark.parametrize(
    ("dim", "groups", "tiles"), [(128, 128, 3), (384, 32, 8)], ids=["tiles", "lines"]
)
def test_several_tiles_together(
    run_in_tpu_interpreter, monkeypatch, dim, groups, tiles
):
    monkeypatch.setattr(update, "_TILES_INTERPRETED", tiles)
    config = Config(groups, 16, unroll=1)
    check(run_in_tpu_interpreter, Case("", 150, dim, 40, "zipf"), config=config)
