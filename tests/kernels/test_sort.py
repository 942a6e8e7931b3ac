"""Sorting by the TensorCore's kernel, interpreted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.kernels.sort import sort, unsupported
from sparse_adam.ops.sorting import in_order

# Fusions of so many comparisons take XLA a minute on a CPU.
QUICKLY: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "cpu-instruction-fusion",
}


def interpreted(words, num_keys):
    run = jax.jit(lambda *words: sort(words, num_keys, interpret=True))
    return run.lower(*words).compile(compiler_options=QUICKLY)(*words)


def test_pairs_and_their_payload_where_registers_take_two_passes(monkeypatch):
    """Of four registers, of which two are held at a time, and not all are full."""
    monkeypatch.setattr("sparse_adam.kernels.sort._HELD_BITS", 1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (1, 3000)).astype(np.int32)
    positions = np.arange(ids.size, dtype=np.int32)[None]
    payload = rng.normal(size=ids.shape).astype(np.float32)
    found = interpreted((ids, positions, payload), 2)
    order = np.argsort(ids, kind="stable")
    for x, expected in zip(found, (ids, positions, payload), strict=True):
        np.testing.assert_array_equal(x, np.take_along_axis(expected, order, axis=1))


def test_words_of_two_tables():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (2, 2048), dtype=np.uint32)
    words[:, 5] = np.iinfo(np.uint32).max
    payload = np.arange(words.size, dtype=np.int32).reshape(words.shape)
    found, carried = interpreted((words, payload), 1)
    np.testing.assert_array_equal(found, np.sort(words))
    np.testing.assert_array_equal(words.reshape(-1)[carried], found)


@pytest.mark.parametrize(
    ("shape", "count", "why"),
    [
        ((1024,), 1, "1024 words fill no more than one vector register"),
        ((2**18,), 5, "the words take 10485760 bytes of vector memory"),
        ((2, 2**18), 3, "the words take 12582912 bytes of vector memory"),
        ((2**18,), 4, None),
    ],
)
def test_what_it_leaves_to_xla(shape, count, why):
    assert unsupported(shape, count) == why


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_in_the_order_of_a_plan(platform):
    rng = np.random.default_rng(0)
    order = rng.permutation(24).astype(np.int32)
    arrays = [
        rng.integers(-1, 9, 24).astype(np.int32),
        rng.normal(size=24).astype(np.float32),
    ]
    found = in_order(platform, jnp.asarray(order), list(map(jnp.asarray, arrays)))
    for x, y in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(y, x[order])
