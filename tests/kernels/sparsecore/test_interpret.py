"""The SparseCore kernel on a CPU, through the shim.

Small shapes run in the interpreter that models a TPU: a DMA happens when it is waited
for, fresh memory is NaN, and races fail the test. The plain interpreter, which sees
none of that, runs the large ones: balance, and runs that span subcores.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.kernels.sparsecore import Config, sparsecore_update, unsupported
from sparse_adam.kernels.sparsecore.work import share_out, split_runs
from tests import cases, helpers
from tests.cases import Arrays, Case
from tests.kernels import row_kernels
from tests.kernels.row_kernels import plainly

CHUNK = 8
ONE = Config(cores=1, subcores=1, lanes=128, chunk=CHUNK, streams=1)
TWO = Config(cores=1, subcores=2, lanes=128, chunk=CHUNK, streams=1)
STEPS = {"use_gradient_accumulation": False, "beta_2": 0.9}
FIVE = Config(cores=1, subcores=5, lanes=128, chunk=16, streams=1)


run_kernel = functools.partial(row_kernels.run_kernel, sparsecore_update)


def check(run, case, ids=None, config=TWO):
    row_kernels.check_kernel(sparsecore_update, run, case, ids, config)


# In the interpreter that models a TPU.


@pytest.mark.parametrize(("streams", "semaphores"), [(1, 1), (2, 4)])
def test_more_chunks_than_slots(run_in_tpu_interpreter, streams, semaphores):
    config = Config(1, 1, 128, 16, streams=streams, semaphores=semaphores)
    check(run_in_tpu_interpreter, Case("", 90, 128, 85, "distinct"), config=config)


def test_vectors_of_a_subcore(run_in_tpu_interpreter):
    config = Config(cores=2, subcores=1, lanes=16, chunk=16)
    check(run_in_tpu_interpreter, Case("", 40, 128, 20, "zipf"), config=config)


@pytest.mark.parametrize("distribution", ["equal", "padded"])
def test_distributions(run_in_tpu_interpreter, distribution):
    check(run_in_tpu_interpreter, Case("", 40, 128, 37, distribution))


# In which the interpreted kernel differs: it has neither streams nor overlapped loops.
FORMS = ({}, {"fixed_loops": True}, {"filled_lists": True}, Config.SAFE_FORMS)


@pytest.mark.parametrize("forms", FORMS, ids=["", "fixed", "filled", "all"])
def test_a_run_across_chunks_and_subcores(run_in_tpu_interpreter, forms):
    # The whole second chunk is within a run: it lists no row.
    ids = [0, 1, 2, *[3] * 14, 4, *[5] * 9, 6, 7, 8]
    config = dataclasses.replace(TWO, **forms)
    check(run_in_tpu_interpreter, Case("", 40, 128, len(ids)), ids[::-1], config)


def test_wide_rows_weighted(run_in_tpu_interpreter):
    case = Case("", 16, 256, 20, "zipf", weighted=True)
    assert cases.arrays(case).weights["sample_ids"].min() < 0
    check(run_in_tpu_interpreter, case)


def test_steps_across_chunks_and_subcores(run_in_tpu_interpreter):
    # The second of two workers begins in the middle of a run, and of a chunk.
    ids = [0, 1, 2, *[3] * 11, 4, *[5] * 9, 6, 7, 8]
    case = Case("", 40, 128, len(ids), options=STEPS)
    check(run_in_tpu_interpreter, case, ids[::-1])


# In the plain interpreter.


@pytest.mark.parametrize("distribution", cases.DISTRIBUTIONS)
def test_many_chunks(distribution):
    check(plainly, Case("", 700, 128, 1500, distribution), config=FIVE)


# FIVE takes 1,600 sorted ids in 100 chunks: 20 chunks, 320 ids, a subcore.
SHARE = 320


HOT = {
    "one id everywhere": [5 * SHARE],
    "two, split inside a chunk": [2 * SHARE + 7, 3 * SHARE - 7],
    "runs that end where a share does": [SHARE] * 5,
    "beside it": [SHARE - 1, 1, 1, SHARE - 2, 1, SHARE, 2 * SHARE],
    "across it by one": [SHARE + 1, 2 * SHARE - 2, 2, 2 * SHARE - 1],
    "over whole shares": [10, 3 * SHARE, *[1] * (2 * SHARE - 10)],
    "runs that end where chunks do": [16] * 100,
    "into a chunk of distinct ids": [*[1] * 15, 2, *[1] * (5 * SHARE - 17)],
}


@pytest.mark.parametrize("options", [{}, STEPS], ids=["sums", "steps"])
@pytest.mark.parametrize("runs", HOT.values(), ids=HOT.keys())
def test_hot_ids(runs, options):
    assert sum(runs) == 5 * SHARE
    ids = np.repeat(3 * np.arange(len(runs)), runs)
    np.random.default_rng(0).shuffle(ids)
    # Of one size, so that all of them are one program.
    case = Case("", 3 * max(map(len, HOT.values())), 128, ids.size, options=options)
    check(plainly, case, ids, FIVE)


def test_three_blocks_of_lanes():
    options = {"sum_inside_sqrt": False, "weight_decay_factor": 0.25, "clipvalue": 1.0}
    case = Case("", 40, 384, 300, "zipf", weighted=True, options=options)
    check(plainly, case, config=FIVE)


def test_steps_of_wide_rows():
    options = STEPS | {"sum_inside_sqrt": False, "weight_decay_factor": 0.25}
    case = Case("", 40, 384, 300, "zipf", weighted=True, options=options)
    check(plainly, case, config=FIVE)


@pytest.mark.parametrize("options", [{}, STEPS], ids=["sums", "steps"])
def test_no_valid_id(options):
    check(plainly, Case("", 40, 128, 50, options=options), np.full(50, -1), FIVE)


def test_the_same_call_gives_the_same_bits():
    arrays = cases.arrays(Case("", 20, 128, 1600, "zipf"))
    grads = np.random.default_rng(0).standard_normal(arrays.grads.shape, np.float32)
    case = Case("", 20, 128, 1600)
    first, second = (
        run_kernel(plainly, arrays._replace(grads=grads), case, FIVE)[0]
        for _ in range(2)
    )
    helpers.assert_states_bitwise_equal(first, second)


def test_nan_stays_in_a_run_that_spans_subcores():
    case = Case("", 12, 128, 5 * SHARE)
    state, _, grads, _ = cases.arrays(case)
    ids = np.repeat(np.array([1, 5, 6, 9], np.int32), [300, 700, 400, 200])
    clean, _ = run_kernel(plainly, Arrays(state, ids, grads, {}), case, FIVE)
    grads = grads.copy()
    grads[650] = np.nan
    dirty, _ = run_kernel(plainly, Arrays(state, ids, grads, {}), case, FIVE)
    for x, old in zip(dirty, clean, strict=True):
        assert np.isnan(x[5]).all()
        others = np.arange(case.num_rows) != 5
        helpers.assert_bitwise_equal(np.asarray(x)[others], np.asarray(old)[others])


# How the work is shared out.


def zipf(size):
    return cases.ids(np.random.default_rng(size), "zipf", 50, size)


@pytest.mark.parametrize(
    "ids",
    [zipf(1), zipf(63), zipf(64), zipf(1000), np.zeros(777), np.full(9, 50)],
    ids=lambda ids: str(ids.size),
)
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_every_subcore_gets_its_share(ids, workers):
    ids = np.sort(ids).astype(np.int32)
    work = shares(ids, workers)
    valid = int((ids < 50).sum())
    active = -(-valid // CHUNK)
    share = -(-active // workers)
    edges = np.minimum(np.arange(workers + 1) * share, active) * CHUNK
    bounds, firsts, counts = np.split(np.asarray(work.shares), 3)
    np.testing.assert_array_equal(bounds[: workers + 1], edges)
    assert (bounds[workers:] == edges[-1]).all()  # nothing for those behind
    np.testing.assert_array_equal(firsts * CHUNK, bounds)
    np.testing.assert_array_equal(counts[:workers] * CHUNK, np.diff(edges))

    # What is split is what stands on both sides of an edge.
    expected = []
    for begin, end in itertools.pairwise(edges):
        mine = ids[begin:end]
        head = tail = 50
        if mine.size and begin and ids[begin - 1] == mine[0]:
            head = mine[0]
        if mine.size and end < valid and ids[end] == mine[-1] != head:
            tail = mine[-1]
        expected += [head, tail]
    found = split_runs(work, 50, workers)
    np.testing.assert_array_equal(found, expected)

    # Whole runs begin in the share of the worker that takes them.
    work = shares(ids, workers, whole_runs=True)
    whole, firsts, counts = np.split(np.asarray(work.shares), 3)
    ends = np.append(whole[1:], whole[-1:])
    assert ((firsts * CHUNK <= whole) & (whole < (firsts + 1) * CHUNK)).all()
    assert ((counts > 0) == (whole < ends)).all()
    behind = (firsts + counts) * CHUNK - ends
    assert ((behind >= 0) & (behind < CHUNK))[counts > 0].all()
    following = np.append(ids, -1)
    assert (np.diff(whole) >= 0).all()
    for edge, moved in zip(edges, whole, strict=False):
        assert edge <= moved
        assert np.unique(ids[max(edge - 1, 0) : moved]).size <= 1
        assert moved in (0, edges[-1]) or ids[moved - 1] != following[moved]


def shares(ids, workers, whole_runs=False):
    config = Config(cores=1, subcores=workers, lanes=128, chunk=CHUNK)
    sources = jnp.arange(ids.size)
    return share_out(
        *(jnp.asarray(ids), sources, None, 50, config, workers), whole_runs=whole_runs
    )


# What it cannot do.


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((40, 64), "D=64 is not a multiple of 128"),
        ((40, 1152), "D=1152 is above 1024"),
        ((41, 256), "V=41 is not a multiple of 8"),
        ((2**25 + 8, 128), "16 GiB"),
    ],
)
def test_unsupported_sizes(shape, words):
    def problem(num_rows, dim):
        case = Case("", 8, 128, 8)
        small = helpers.spec(case, cases.arrays(case))
        return helpers.changed(small, num_rows=num_rows, dim=dim)

    assert words in unsupported(problem(*shape))
    assert unsupported(problem(41, 128)) is None
    assert unsupported(problem(2**25, 128)) is None


def test_sizes_are_given_or_left_to_the_update():
    with pytest.raises(ValueError, match="chunk=16: give all four, or none"):
        Config(chunk=16)
    with pytest.raises(ValueError, match="semaphores=0 must be at least 1"):
        Config(semaphores=0)
    case = Case("", 8, 128, 8)
    config = Config(row_copies=True).completed(helpers.spec(case, cases.arrays(case)))
    assert config.chunk and config.row_copies


def test_chunks_hold_whole_vectors():
    with pytest.raises(ValueError, match="chunk=24 must be a positive multiple"):
        Config(cores=1, subcores=1, lanes=16, chunk=24)
    with pytest.raises(ValueError, match="chunk=12"):
        Config(cores=1, subcores=1, lanes=8, chunk=12)
