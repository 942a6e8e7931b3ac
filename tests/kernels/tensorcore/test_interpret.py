"""The TensorCore kernel in the interpreter that models a TPU's memories and DMAs.

The plain interpreter runs a DMA at its start and so cannot see a missing wait, a buffer
read too early or two DMAs that race. Chunks are tiny here: a few rows fill several.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import AdamState, PackedTable, reference, sparse_adam_update
from sparse_adam.kernels import chips
from sparse_adam.kernels.tensorcore import tensorcore_update
from sparse_adam.kernels.tensorcore.config import SLOTS, Config
from tests import cases, helpers
from tests.cases import Arrays, Case
from tests.kernels import row_kernels

SMALL = Config(rows_per_chunk=8, dma_unroll=4)


STEPS = {"use_gradient_accumulation": False, "beta_2": 0.9}
BFLOAT16_SLOTS = ("float32", "bfloat16", "bfloat16", "float32")


def check(run, case, ids=None, config=SMALL, packed=False):
    row_kernels.check_kernel(tensorcore_update, run, case, ids, config, packed)


def test_more_chunks_than_slots(run_in_tpu_interpreter):
    case = Case("", 40, 128, 8 * SLOTS + 5, "distinct")
    check(run_in_tpu_interpreter, case)


@pytest.mark.parametrize("dma_unroll", [3, 16])
def test_last_chunk_is_not_full(run_in_tpu_interpreter, dma_unroll):
    config = Config(rows_per_chunk=16, dma_unroll=dma_unroll)
    check(run_in_tpu_interpreter, Case("", 40, 128, 29, "distinct"), config=config)


@pytest.mark.parametrize("distribution", ["equal", "zipf", "padded", "wild"])
def test_distributions(run_in_tpu_interpreter, distribution):
    check(run_in_tpu_interpreter, Case("", 40, 128, 29, distribution))


@pytest.mark.parametrize(("first", "run"), [(3, 5), (3, 6), (7, 9), (5, 18), (0, 29)])
def test_runs_across_chunks(run_in_tpu_interpreter, first, run):
    # Sorted: `first` distinct ids, a run of one, distinct ids again.
    ids = [*range(first), *[first] * run, *range(first + 1, 30 - run)]
    check(run_in_tpu_interpreter, Case("", 40, 128, 29), ids[::-1])


@pytest.mark.parametrize(
    "ids",
    [
        [7] * 29,  # one core has nothing to do
        [*range(10), *[10] * 9, *range(11, 21)],  # a run lies across the middle
        [*range(12), *[-1] * 17],
        [-1] * 29,
    ],
    ids=["equal", "a run in the middle", "distinct, padded", "none"],
)
def test_two_cores(run_on_two_cores, ids):
    config = Config(rows_per_chunk=8, dma_unroll=4, cores=2)
    check(run_on_two_cores, Case("", 40, 128, 29), ids, config)


@pytest.mark.parametrize("options", [{}, STEPS], ids=["sums", "steps"])
def test_two_cores_never_share_lines(run_on_two_cores, options):
    # All 16 ids around the middle are of two groups of 8 rows.
    ids = [*range(12), *range(16, 24), *[25, 25, 30]]
    config = Config(rows_per_chunk=8, dma_unroll=4, cores=2)
    case = Case("", 40, 16, len(ids), "uniform", weighted=True, options=options)
    check(run_on_two_cores, case, ids, config, packed=True)


def test_one_id_for_two_cores(run_on_two_cores):
    config = Config(rows_per_chunk=8, dma_unroll=4, cores=2)
    check(run_on_two_cores, Case("", 40, 128, 1), [3], config)


@pytest.mark.parametrize("rates", [(0.01, 0.01), (0.01, 0.1)], ids=["tall", "in turn"])
def test_tables_under_vmap_on_two_cores(rates, monkeypatch):
    """T tables are one tall table; with a rate each, they are updated in turn."""
    asked = []

    def two_cores():
        asked.append(chips.UNKNOWN)
        return dataclasses.replace(chips.UNKNOWN, cores=2)

    monkeypatch.setattr(chips, "in_scope", two_cores)
    tables = [cases.arrays(Case("", 40, 128, 29), seed) for seed in range(2)]
    shared = rates[0] == rates[1]

    def update(state: AdamState, ids, grads, rate):
        options = {"learning_rate": rate, "implementation": "tensorcore"}
        return sparse_adam_update(*state, ids, grads, **options)

    update = jax.jit(jax.vmap(update, in_axes=(0, 0, 0, None if shared else 0)))
    state = AdamState(
        *(jnp.stack([jnp.asarray(t.state[i]) for t in tables]) for i in range(3))
    )
    ids, grads = np.stack([t.ids for t in tables]), np.stack([t.grads for t in tables])
    rate = jnp.float32(rates[0] if shared else rates)
    new = update(state, ids, grads, rate)
    assert asked
    for i, (table, rate) in enumerate(zip(tables, rates, strict=True)):
        arguments = (*table.state, table.ids, table.grads)
        expected = reference.sparse_adam_update(*arguments, learning_rate=rate)
        one = [x[i] for x in new]
        helpers.assert_close_states(one, table.state, expected, learning_rate=rate)


def test_wide_rows(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, Case("", 12, 256, 12))


def test_one_row(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, Case("", 1, 128, 12))


def test_no_valid_id(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, Case("", 40, 128, 29), np.full(29, -1))


@pytest.mark.parametrize("distribution", ["zipf", "padded"])
def test_weighted(run_in_tpu_interpreter, distribution):
    case = Case("", 40, 128, 29, distribution, weighted=True)
    samples = cases.arrays(case).weights["sample_ids"]
    assert samples.min() < 0
    assert samples.max() > case.num_ids // 2
    check(run_in_tpu_interpreter, case)


def test_options(run_in_tpu_interpreter):
    options = {
        "sum_inside_sqrt": False,
        "clipvalue": (None, 1.0),
        "clip_weight_min": -0.5,
        "weight_decay_factor": 0.25,
        "multiply_weight_decay_factor_by_learning_rate": True,
    }
    check(run_in_tpu_interpreter, Case("", 40, 128, 12, "zipf", options=options))


def test_nan_stays_in_its_run(run_in_tpu_interpreter):
    case = Case("", 40, 128, 29)
    state, _, grads, weights = cases.arrays(case)
    ids = np.repeat(np.array([1, 2, 3, 4, 5], np.int32), [5, 6, 2, 9, 7])
    run = functools.partial(
        row_kernels.run_kernel, tensorcore_update, run_in_tpu_interpreter
    )
    clean, _ = run(Arrays(state, ids, grads, weights), case, SMALL)
    grads = grads.copy()
    grads[8] = np.nan  # the run of 2 goes on in the second chunk
    dirty, _ = run(Arrays(state, ids, grads, weights), case, SMALL)
    for x, old in zip(dirty, clean, strict=True):
        assert np.isnan(x[2]).all()
        others = np.arange(case.num_rows) != 2
        helpers.assert_bitwise_equal(np.asarray(x)[others], np.asarray(old)[others])


@pytest.mark.parametrize("options", [{}, STEPS], ids=["sums", "steps"])
@pytest.mark.parametrize(
    ("dim", "dtypes"), [(16, BFLOAT16_SLOTS), (200, cases.FLOAT32)]
)
def test_packed(run_in_tpu_interpreter, dim, dtypes, options):
    # Sorted: rows of one group in three chunks, of others, padding; more than 3 chunks.
    ids = [*[8, 8, 9, 9, 9, 11] * 3, *range(16, 33), *[-1] * 3]
    case = Case("", 40, dim, len(ids), "uniform", dtypes, options=options)
    check(run_in_tpu_interpreter, case, ids, packed=True)


@pytest.mark.parametrize(("first", "run"), [(3, 5), (3, 6), (7, 17), (0, 29)])
def test_steps_across_chunks(run_in_tpu_interpreter, first, run):
    ids = [*range(first), *[first] * run, *range(first + 1, 30 - run)]
    check(run_in_tpu_interpreter, Case("", 40, 128, 29, options=STEPS), ids[::-1])


def test_steps_of_more_chunks_than_slots(run_in_tpu_interpreter):
    case = Case("", 40, 128, 8 * SLOTS + 13, "zipf", options=STEPS)
    check(run_in_tpu_interpreter, case)


def test_stochastic_rounding(run_in_tpu_interpreter):
    case = Case("", 40, 16, 20, "zipf", (*cases.BFLOAT16[:3], "float32"))
    arrays = cases.arrays(case)
    table = PackedTable.pack(*map(jnp.asarray, arrays.state))
    update = functools.partial(
        row_kernels.run_stored,
        *(tensorcore_update, run_in_tpu_interpreter, (table.lines,), arrays, case),
        packed=True,
        seeds=jnp.int32([1, 2, 3]),
    )
    # Neither the chunks nor the interpreter change the noise.
    expected = update(config=Config(rows_per_chunk=32, dma_unroll=1))
    (new,) = update(config=SMALL)
    helpers.assert_bitwise_equal(new, expected[0])
