"""The SparseCore lookup on a CPU, through the shim, beside sums made one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable
from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from sparse_adam.kernels.sparsecore import Config, lookup
from sparse_adam.kernels.sparsecore.work import share_out
from tests import helpers
from tests.kernels.row_kernels import plainly

V = 40
TWO = Config(cores=1, subcores=2, lanes=128, chunk=8, streams=1)
FIVE = Config(cores=1, subcores=5, lanes=16, chunk=16, streams=2)


@functools.cache
def stored(dim, dtype):
    """A table, how it is stored, and its layout; plain where no dtype is given."""
    rng = np.random.default_rng(dim)
    table = jnp.asarray(rng.standard_normal((V, dim)), dtype or jnp.float32)
    if dtype is None:
        return np.asarray(table), table, PlainLayout.of_weights(table)
    # Neighbours in lines and halves of words are there to be taken by mistake.
    slots = jnp.full((V, dim), 7, jnp.bfloat16)
    packed = PackedTable.pack(table, slots, slots)
    return np.asarray(table, np.float32), packed.lines, packed.layout


def batch(samples, places, owned=False, weighted=False, seed=0):
    """Ids, their samples, and their gains; a third of the ids are none."""
    rng = np.random.default_rng(seed)
    size = samples * places
    ids = rng.integers(0, V, size).astype(np.int32)
    ids[rng.random(size) < 1 / 3] = -1
    owners = np.sort(rng.integers(0, samples + 1, size)).astype(np.int32)
    gains = rng.standard_normal(size).astype(np.float32)
    return ids, owners if owned else None, gains if weighted else None


def expected(table, ids, owners, gains, samples):
    """The rows of each sample, added one after the other in float32."""
    if owners is None:
        owners = np.repeat(np.arange(samples), ids.size // samples)
    sums = np.zeros((samples + 1, table.shape[1]), np.float32)
    for i, (row, owner) in enumerate(zip(ids, owners, strict=True)):
        if row >= 0:
            sums[owner] += table[row] if gains is None else gains[i] * table[row]
    return sums[:samples]


def combined(run, dim, dtype, given, samples, config):
    """What the kernel makes of a batch, interpreted by `run`."""
    _, array, layout = stored(dim, dtype)
    ids, owners, gains = (None if x is None else jnp.asarray(x) for x in given)

    @jax.jit
    def kernel(array, ids, owners, gains):
        return lookup.combine_rows(
            *(array, ids, layout, config),
            num_samples=samples,
            owners=owners,
            gains=gains,
            interpret=True,
        )

    return run(kernel, array, ids, owners, gains)


def check(run, dim, dtype, samples, places, config, **kind):
    given = batch(samples, places, **kind)
    found = combined(run, dim, dtype, given, samples, config)
    right = expected(stored(dim, dtype)[0], *given, samples)
    if given[2] is None:
        np.testing.assert_array_equal(found, right)
    else:  # a product and a sum may be one operation
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


# In the interpreter that models a TPU: waits, fresh memory that is NaN, races.


@pytest.mark.parametrize("places", [1, 3])
def test_more_chunks_than_slots(run_in_tpu_interpreter, places):
    config = Config(cores=1, subcores=1, lanes=128, chunk=16, streams=2)
    check(run_in_tpu_interpreter, 128, None, 85 // places, places, config)


def test_samples_across_chunks_and_subcores(run_in_tpu_interpreter):
    kind = {"owned": True, "weighted": True}
    check(run_in_tpu_interpreter, 128, None, 3, 13, TWO, **kind)


def test_narrow_packed_rows(run_in_tpu_interpreter):
    check(run_in_tpu_interpreter, 32, jnp.bfloat16, 11, 3, TWO)


# In the plain interpreter.


@pytest.mark.parametrize(
    ("dim", "dtype", "samples", "places", "kind"),
    [
        (128, None, 50, 1, {}),
        (128, None, 7, 20, {}),
        (128, jnp.float32, 30, 3, {"weighted": True}),
        (256, None, 30, 3, {}),
        (200, jnp.bfloat16, 13, 3, {"owned": True}),
        (32, jnp.float32, 200, 1, {}),
        (16, jnp.float32, 30, 5, {"owned": True, "weighted": True}),
    ],
)
def test_values(dim, dtype, samples, places, kind):
    check(plainly, dim, dtype, samples, places, FIVE, **kind)


def test_rows_are_looked_up_bit_for_bit():
    table, array, layout = stored(32, jnp.bfloat16)
    ids = np.array([3, -1, 0, 39, 3], np.int32)
    found = lookup.lookup_rows(array, jnp.asarray(ids), layout, TWO, interpret=True)
    right = np.where((ids >= 0)[:, None], table[ids], 0).astype(jnp.bfloat16)
    helpers.assert_bitwise_equal(found, right)


def test_nan_stays_in_the_sample_that_asks_for_it():
    table = np.ones((V, 128), np.float32)
    table[0] = np.nan
    ids = np.array([1, 0, 2, -1, 3, -1, 4, 5], np.int32)
    gains = np.where(ids < 0, np.nan, 1).astype(np.float32)
    found = lookup.combine_rows(
        *(jnp.asarray(table), jnp.asarray(ids)),
        *(PlainLayout.of_weights(jnp.asarray(table)), TWO),
        num_samples=4,
        gains=jnp.asarray(gains),
        interpret=True,
    )
    np.testing.assert_array_equal(found[:, 0], [np.nan, 1, 1, 2])


def test_no_ids():
    _, array, layout = stored(128, None)
    ids = jnp.zeros((0,), jnp.int32)
    found = lookup.combine_rows(array, ids, layout, num_samples=3, interpret=True)
    np.testing.assert_array_equal(found, np.zeros((3, 128)))


# How the work is shared out.


@pytest.mark.parametrize(("samples", "places"), [(50, 3), (7, 20), (3, 50), (64, 1)])
@pytest.mark.parametrize("workers", [1, 5])
def test_shares_of_equal_samples_are_those_that_a_search_finds(
    samples, places, workers
):
    owners = jnp.repeat(jnp.arange(samples), places)
    rows = jnp.zeros_like(owners)
    config = Config(cores=1, subcores=workers, lanes=128, chunk=8)
    share = functools.partial(
        *(share_out, owners, rows, None, samples, config, workers), whole_runs=True
    )
    found, right = share(run_length=places), share()
    size, chunk = samples * places, config.chunk
    begins, firsts, chunks = np.split(np.asarray(found.shares), 3)
    np.testing.assert_array_equal(
        np.minimum(begins, size), np.minimum(np.split(right.shares, 3)[0], size)
    )
    ends = np.append(begins[1:], begins[-1])
    covered = (firsts * chunk <= begins) & ((firsts + chunks) * chunk >= ends)
    assert (covered | (begins == ends)).all()


# What it cannot do.


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (PlainLayout(40, 64, (np.dtype("f4"),), (False,)), "is not a multiple of 128"),
        (PlainLayout(40, 128, (np.dtype("f2"),), (False,)), "table is float16"),
        (PackedLayout(40, 20), "stand 24 words apart"),
    ],
)
def test_unsupported(layout, words):
    assert words in lookup.unsupported(layout)


def test_bytes_moved():
    # A row in, a third of one out; its row and sample; the lists of what is moved.
    layout = PlainLayout(40, 128, (np.dtype("f4"),), (False,))
    assert lookup.bytes_moved(30, 10, layout) == 30 * 512 + 10 * 512 + 30 * 16
