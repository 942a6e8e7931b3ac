"""Where each row of a packed table stands."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.kernels.layout import MAX_DIM, PackedLayout

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
PAIRS = tuple(itertools.product((FLOAT32, BFLOAT16), repeat=3))
DIMS = (1, 2, 3, 7, 8, 9, 16, 20, 31, 32, 64, 65, 100, 127, 128, 129, 256, 768, MAX_DIM)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtypes", PAIRS)
def test_every_number_has_a_place_of_its_own(dim, dtypes):
    layout = PackedLayout(11, dim, dtypes)
    lines, lanes = layout.shape
    assert lines % 8 == 0
    assert layout.num_groups * layout.rows_per_group >= 11
    taken = np.zeros((lines, lanes, 2), int)  # halves of words
    row, column = (x.reshape(-1) for x in np.indices((11, dim)))
    group, place = np.divmod(row, layout.rows_per_group)
    block, lane = np.divmod(column, 128)
    for plane, arrays in enumerate(layout.planes):
        line = group * layout.lines_per_group + np.array(
            [layout.line(plane, int(k)) for k in block]
        )
        np.add.at(taken, (line, place * layout.stride + lane), 1)
        assert len(arrays) <= 2
    assert taken.max() == 1


@pytest.mark.parametrize("dtypes", PAIRS)
def test_every_array_is_in_one_plane(dtypes):
    planes = PackedLayout(11, 16, dtypes).planes
    assert sorted(itertools.chain(*planes)) == [0, 1, 2]
    assert 0 in planes[0]
    for arrays in planes:
        assert len(arrays) == 1 or all(dtypes[t] == BFLOAT16 for t in arrays)


def test_rows_can_be_moved_alone_from_8_lanes_on():
    for dim in range(8, MAX_DIM + 1):
        layout = PackedLayout(11, dim)
        assert layout.stride % 8 == 0
        assert layout.rows_per_group * layout.stride <= 128
        assert layout.blocks * layout.stride >= min(dim, 128)


@pytest.mark.parametrize(
    ("dim", "dtypes", "waste"),
    [
        *((dim, (FLOAT32,) * 3, 0.0) for dim in (8, 16, 32, 64, 128, 256, 768)),
        (100, (FLOAT32,) * 3, 28 / 128),
        *((dim, (FLOAT32, BFLOAT16, BFLOAT16), 0.0) for dim in (8, 64, 128, 768)),
        (128, (BFLOAT16,) * 3, 1 / 4),
        (128, (BFLOAT16, FLOAT32, FLOAT32), 1 / 6),
    ],
)
def test_waste(dim, dtypes, waste):
    assert PackedLayout(1_000_000, dim, dtypes).waste == pytest.approx(waste)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_words_hold_the_values(dtypes):
    layout = PackedLayout(11, 16, dtypes)
    rng = np.random.default_rng(0)
    values = tuple(
        jnp.asarray(rng.standard_normal((8, 16)), dtype).astype(jnp.float32)
        for dtype in dtypes
    )
    words = layout.words(values)
    assert all(x.dtype == jnp.int32 for x in words)
    for x, expected in zip(layout.values(words), values, strict=True):
        np.testing.assert_array_equal(x, expected)
    weights = layout.weights(words[0])
    assert weights.dtype == dtypes[0]
    np.testing.assert_array_equal(weights.astype(jnp.float32), values[0])
