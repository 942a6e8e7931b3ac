"""The lookup in C++: its values, and what it promises of threads and of bad ids."""

import dataclasses
import functools
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_adam.kernels.cpu import library, lookup
from sparse_adam.kernels.cpu.places import weights_places
from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from tests import programs
from tests.helpers import assert_bitwise_equal
from tests.kernels.cpu.lookups import (
    BATCHES,
    BFLOAT16,
    ENCODINGS,
    Batch,
    Case,
    assert_right,
    combined,
    draw,
    looked_up,
    rows_of,
)


@pytest.mark.parametrize("case", ENCODINGS + BATCHES, ids=str)
def test_values(case):
    batch = draw(case)
    assert_right(case, batch, combined(case, batch))


@pytest.mark.parametrize("case", ENCODINGS, ids=str)
def test_single_rows_are_the_tables_bit_for_bit(case):
    batch = draw(case)
    assert_bitwise_equal(looked_up(case, batch), rows_of(case, batch))


def test_single_rows_keep_signs_of_zero_and_nans():
    table = np.array([[-0.0, np.nan], [0.0, -np.inf]], np.float32)
    found = jax.jit(lookup.lookup_rows)(table, jnp.array([1, 0, -1, 2]))
    assert_bitwise_equal(
        np.asarray(found), np.concatenate([table[::-1], np.zeros((2, 2), np.float32)])
    )


def test_no_id_is_zeros_whatever_its_gain_and_scale():
    table = jnp.full((3, 20), jnp.nan)
    ids = jnp.array([-1, 3, 2**31 - 1, -(2**31)], jnp.int32)
    infinite = jnp.full((4,), jnp.inf)
    found = lookup.combine_rows(
        table, ids, num_samples=2, gains=infinite, scales=infinite[:2]
    )
    assert_bitwise_equal(np.asarray(found), np.zeros((2, 20), np.float32))


def test_a_nan_stays_in_its_sample_and_column():
    table = np.zeros((3, 20), np.float32)
    table[1, 7] = np.nan
    ids = jnp.array([0, 2, 1, 0, 2, 2], jnp.int32)
    found = np.asarray(lookup.combine_rows(jnp.asarray(table), ids, num_samples=3))
    assert np.argwhere(np.isnan(found)).tolist() == [[1, 7]]


def test_rows_are_added_in_the_order_of_the_ids():
    # In float32 the sum depends on the order.
    table = jnp.array([[1.0], [2.0**24], [-(2.0**24)]])
    batches = {(1, 0, 2): 0.0, (1, 2, 0): 1.0, (0, 1, 2): 0.0}
    for ids, right in batches.items():
        found = lookup.combine_rows(table, jnp.array(ids, jnp.int32), num_samples=1)
        assert float(found[0, 0]) == right
        # The other samples stand in between.
        mixed = jnp.array([x for i in ids for x in (i, 0)], jnp.int32)
        found = lookup.combine_rows(
            table, mixed, num_samples=2, samples=jnp.array([1, 0] * 3, jnp.int32)
        )
        assert np.asarray(found).tolist() == [[3.0], [right]]


def test_more_samples_than_ids():
    table = jnp.arange(12, dtype=jnp.float32).reshape(4, 3)
    ids, samples = jnp.array([3, 1, 2], jnp.int32), jnp.array([6, 0, 6], jnp.int32)
    found = np.asarray(lookup.combine_rows(table, ids, num_samples=9, samples=samples))
    expected = np.zeros((9, 3), np.float32)
    expected[0], expected[6] = table[1], table[3] + table[2]
    assert_bitwise_equal(found, expected)


def test_forms_and_storages_agree_bit_for_bit():
    case = Case(num_samples=200, places=7, weighted=True, scaled=True, dim=40)
    batch = draw(case)
    right = combined(case, batch)
    owners = np.repeat(np.arange(200, dtype=np.int32), 7)
    shuffled = np.argsort(np.random.default_rng(0).integers(0, 3, 1400), kind="stable")
    by_sample = np.argsort(owners[shuffled], kind="stable")
    gains = batch.gains
    assert gains is not None
    for order in (np.arange(1400), shuffled):
        told = dataclasses.replace(
            batch,
            ids=batch.ids[order],
            samples=owners[order],
            gains=gains[order],
        )
        if order is shuffled:  # the order of a sample's ids has changed
            ordered = order[by_sample]
            right = combined(
                case,
                dataclasses.replace(
                    batch, ids=batch.ids[ordered], gains=gains[ordered]
                ),
            )
        assert_bitwise_equal(combined(case, told), right)
        packed = dataclasses.replace(case, packed=True)
        assert_bitwise_equal(combined(packed, told), right)


def test_under_shard_map_and_vmap():
    case = Case(num_samples=40)
    batch = draw(case)
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    table, ids = jnp.asarray(batch.state[0]), jnp.asarray(batch.ids)
    right = combined(case, batch)
    each = PartitionSpec("t")
    run = functools.partial(lookup.combine_rows, num_samples=20)
    mapped = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), each), out_specs=each)
    )
    assert_bitwise_equal(np.asarray(mapped(table, ids)), right)
    halves = jax.vmap(run, in_axes=(None, 0))(table, ids.reshape(2, -1))
    assert_bitwise_equal(np.asarray(halves).reshape(40, -1), right)


def test_threads_may_run_where_they_might_before():
    # A helper leaves its caller's processor, and must not stay bound elsewhere.
    case = Case(num_samples=2000, places=40, num_rows=9000, dim=64)
    batch = draw(case)
    for _ in range(3):
        combined(case, batch)
    tasks = Path("/proc/self/task")  # there is none but on Linux, where threads move
    threads = [int(task.name) for task in tasks.iterdir()] if tasks.exists() else []
    allowed = [os.sched_getaffinity(thread) for thread in threads]
    assert all(processors == os.sched_getaffinity(0) for processors in allowed)


def test_no_work_grows_with_the_table():
    table = jax.ShapeDtypeStruct((500_000, 128), jnp.float32)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    run = functools.partial(lookup.combine_rows, num_samples=16)
    program = programs.as_for_users(jax.jit(run).lower(table, ids))
    assert "sparse_adam_cpu_combine" in programs.text(program)
    assert programs.memory(program).temp_size_in_bytes < 4096
    assert "copy(" not in programs.text(program)


IDS = jnp.zeros((6,), jnp.int32)
TABLE = jnp.ones((4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": jnp.zeros((6,), jnp.int16)}, TypeError, "ids.dtype=int16"),
        ({"ids": IDS.reshape(2, 3)}, ValueError, r"ids.shape=\(2, 3\)"),
        ({"samples": IDS[:5]}, ValueError, r"samples.shape=\(5,\)"),
        ({"samples": jnp.ones((6,))}, TypeError, "samples.dtype=float32"),
        ({"gains": jnp.ones((5,))}, ValueError, r"gains.shape=\(5,\)"),
        ({"gains": IDS}, TypeError, "gains.dtype=int32"),
        ({"scales": jnp.ones((6,))}, ValueError, r"scales.shape=\(6,\)"),
        ({"num_samples": 4}, ValueError, "ids.size=6 must be a multiple"),
        ({"num_samples": 0}, ValueError, "ids.size=6 must be a multiple"),
        ({"stored": TABLE[0]}, ValueError, r"stored.shape=\(8,\)"),
        ({"stored": TABLE.astype(jnp.float16)}, TypeError, "stored.dtype=float16"),
        ({"dtype": "bfloat16"}, TypeError, "dtype=bfloat16"),
        ({"layout": PackedLayout(4, 8)}, TypeError, "stored.dtype=float32"),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments, error, message):
    given = {"stored": TABLE, "ids": IDS, "num_samples": 2} | arguments
    with pytest.raises(error, match=message):
        lookup.combine_rows(**given)


NONE, NO_SAMPLES = jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.int32)
PLACES = {
    "num_rows": 4,
    "first": 0,
    "encoding": 0,
    "rows_per_group": 4,
    "stride": 8,
    "group_stride": 0,
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_rows": 5, "rows_per_group": 5}, "too few"),
        ({"num_rows": 5, "group_stride": 32}, "too few"),
        ({"num_rows": 5, "group_stride": 31}, "group_stride=31 must be at least 32"),
        ({"first": 1}, "too few"),
        ({"first": -1}, "first=-1 must be at least 0"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"rows_per_group": 0}, "rows_per_group=0 must be at least 1"),
        ({"stride": -8}, "stride=-8 must be at least 8"),
        ({"stride": 7}, "stride=7 must be at least 8"),
        ({"encoding": 5}, "encoding=5 must be below 5"),
        ({"encoding": 1}, "float32 or bfloat16"),
        ({"encoding": 3}, "float32 or bfloat16"),
        ({"table": TABLE.astype(jnp.float16)}, "float32 or bfloat16"),
        (
            {
                "table": TABLE.astype(BFLOAT16),
                "encoding": 1,
                "rows_per_group": 2,
                "group_stride": 16,
            },
            "one behind the other",
        ),
        ({"out": ((2, 9), "float32")}, "stride=8 must be at least 9"),
        ({"out": ((2, 8), "bfloat16")}, "the result must be"),
        ({"out": ((16,), "float32")}, "two axes"),
        ({"out": ((4, 8), "float32")}, "samples must be"),
        ({"samples": jnp.zeros((5,), jnp.int32)}, "samples must be"),
        ({"gains": jnp.ones((5,))}, "gains must be"),
        ({"scales": jnp.ones((5,))}, "scales must be"),
    ],
    ids=str,
)
def test_the_library_trusts_nobody(bad, message):
    arrays = {"table": TABLE, "ids": IDS, "samples": NO_SAMPLES}
    arrays |= {"gains": NONE, "scales": NONE}
    arrays |= {name: x for name, x in bad.items() if name in arrays}
    places = PLACES | {name: x for name, x in bad.items() if name in PLACES}
    shape, dtype = bad.get("out", ((2, 8), "float32"))
    call = jax.ffi.ffi_call(
        "sparse_adam_cpu_combine", jax.ShapeDtypeStruct(shape, dtype)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*arrays.values(), **{name: np.int32(x) for name, x in places.items()})


def test_without_its_library(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "it was not built")
    with pytest.raises(ValueError, match="not available: it was not built"):
        lookup.lookup_rows(TABLE, IDS)


def test_bytes_moved():
    # By hand: three rows in, one out, three ids.
    assert lookup.bytes_moved(num_ids=3, num_samples=1, dim=16) == 4 * (48 + 16 + 3)


def encoded(case: Case, batch: Batch, *, combine: bool) -> bytes:
    """A call as the driver reads it."""
    table = batch.stored(case)
    layout = case.layout or PlainLayout(
        case.num_rows, case.dim, (table.dtype,), (False,)
    )
    places = weights_places(layout)
    numbers = [
        *(table.nbytes, case.num_rows, case.dim),
        *(places[name] for name in list(PLACES)[1:]),
        *(batch.ids.size, case.num_samples),
        *(combine, case.result_dtype != "float32"),
        *(x is not None for x in (batch.samples, batch.gains, batch.scales)),
    ]
    arrays = (table, batch.ids, batch.samples, batch.gains, batch.scales)
    header = struct.pack("15q", *map(int, numbers))
    return header + b"".join(x.tobytes() for x in arrays if x is not None)


@pytest.mark.parametrize("combine", [False, True], ids=["rows", "combined"])
@pytest.mark.parametrize("named", [ENCODINGS, BATCHES], ids=["encodings", "batches"])
def test_threads_and_instruction_sets_change_no_bit(lookup_driver, named, combine):
    batches = [draw(case) for case in named]
    calls = [
        encoded(case, batch, combine=combine)
        for case, batch in zip(named, batches, strict=True)
    ]
    results = memoryview(lookup_driver(calls))
    for case, batch in zip(named, batches, strict=True):
        dtype = np.dtype(case.result_dtype)
        rows = case.num_samples if combine else batch.ids.size
        size = rows * case.dim * dtype.itemsize
        found = np.frombuffer(results[:size], dtype).reshape(rows, case.dim)
        results = results[size:]
        if combine:
            assert_right(case, batch, found)
        else:
            assert_bitwise_equal(found, rows_of(case, batch))
    assert not results


def test_tables_beyond_32_bits(lookup_driver):
    lookup_driver.run_large()
