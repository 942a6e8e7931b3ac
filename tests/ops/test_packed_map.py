"""Computing with packed tables: words are refused, logical arrays are offered."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam import PackedTable, packed_adam_update

F32, BF16 = jnp.float32, jnp.bfloat16
IDS, GRADS = jnp.array([1, 5]), jnp.ones((2, 16))


def arrays(seed, dtypes=(F32, F32, F32), shape=(24, 16)):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.random(shape), F32).astype(dtype) for dtype in dtypes]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16), (BF16,) * 3])
def test_map_is_tree_map_of_the_arrays(dtypes):
    one, two = arrays(0, dtypes), arrays(1)
    a, b = PackedTable.pack(*one), PackedTable.pack(*two)

    def average(x, y):
        return ((x.astype(F32) + y) / 2).astype(x.dtype)

    got = jax.jit(lambda a, b: a.map(average, b))(a, b)
    assert got.layout == a.layout
    for x, want in zip(got.unpack(), jax.tree.map(average, one, two), strict=True):
        assert x.dtype == want.dtype
        np.testing.assert_array_equal(x, want)


def test_a_cast():
    a = PackedTable.pack(*arrays(0))
    small = a.map(lambda x: x.astype(BF16))
    assert small.layout.dtypes == (np.dtype(BF16),) * 3
    for x, want in zip(small.unpack(), arrays(0), strict=True):
        np.testing.assert_array_equal(x, want.astype(BF16))
    with pytest.raises(TypeError, match=r"table.dtype=float16 must be float32 or"):
        a.map(lambda x: x.astype(jnp.float16))


def test_spread_tables_stay_spread():
    mesh = jax.make_mesh((2,), ("rows",))
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    plain = arrays(0, shape=(256, 16))
    spread = PackedTable.pack(*(jax.device_put(x, rows) for x in plain))
    doubled = spread.map(lambda x: 2 * x)
    sharding = doubled.lines.sharding
    assert isinstance(sharding, NamedSharding) and sharding.spec[0] == "rows"
    for x, want in zip(doubled.unpack(), plain, strict=True):
        np.testing.assert_array_equal(x, 2 * want)


def moving_average(a, b):
    with jax.numpy_dtype_promotion("standard"):  # as it is for users
        return jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, a, b)


def test_lines_that_are_no_words_are_refused():
    a, b = (PackedTable.pack(*arrays(seed)) for seed in (0, 1))
    for broken in (
        jax.tree.map(lambda x, y: (x + y) / 2, a, b),
        moving_average(a, b),
        jax.tree.map(lambda x: x.astype(BF16), a),
    ):
        for use in (
            lambda t: t.lookup(IDS),
            lambda t: t.unpack(),
            lambda t: t.map(lambda x: x),
            lambda t: packed_adam_update(t, IDS, GRADS, learning_rate=0.1),
            lambda t: jax.jit(PackedTable.lookup)(t, IDS),
        ):
            with pytest.raises(TypeError, match=r"must be int32: .*packed.map\(functi"):
                use(broken)
    short = PackedTable(a.lines[:8], a.layout)
    with pytest.raises(ValueError, match=r"inside jax.shard_map, .*layout.divided"):
        short.unpack()


def test_what_map_refuses():
    a = PackedTable.pack(*arrays(0))
    with pytest.raises(TypeError, match=r"others\[0\] is list; it must be a Pack"):
        a.map(jnp.add, cast(Any, arrays(0)))
    for other in (arrays(0)[:2], arrays(0, shape=(24, 8)), arrays(0, shape=(16, 16))):
        with pytest.raises(ValueError, match=r"others\[0\] has \(V, .*\(24, 16, 3\)"):
            a.map(jnp.add, PackedTable.pack(*other))
    with pytest.raises(ValueError, match=r"table.shape=\(16,\) must be \(V, D\)"):
        a.map(lambda x: x.sum(0))
