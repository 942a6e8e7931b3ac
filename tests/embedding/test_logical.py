"""Computing with whole states: the same numbers from plain and from packed tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    RowWiseAdagrad,
    TableConfig,
    from_logical,
    init,
    lookup,
    map_arrays,
    to_logical,
)
from tests.embedding.test_tpu_embedding import CONFIG, assert_same, batch


def state(seed, storage: Any = "plain"):
    return init(CONFIG, Adam(0.1), jax.random.key(seed), storage=storage)


def mean(x, y):
    return (x + y) / 2


@pytest.mark.parametrize("storages", [("packed", "packed"), ("packed", "plain")])
def test_an_average_of_states(storages):
    one, two = (state(seed, s) for seed, s in enumerate(storages))
    want = jax.tree.map(mean, state(0), state(1))
    got = map_arrays(mean, one, two)
    assert jax.tree.structure(got) == jax.tree.structure(one)
    assert_same(to_logical(got), to_logical(want))
    assert_same(lookup(got, *batch(0)), lookup(want, *batch(0)))
    assert_same(map_arrays(mean, state(0), two), want)
    compiled = jax.jit(lambda a, b: map_arrays(mean, a, b))(one, two)
    assert_same(to_logical(compiled), to_logical(want))


def test_to_logical_have_the_names_of_retrieve():
    for storage in ("plain", "packed"):
        found = to_logical(state(0, storage))
        assert {name: list(own) for name, own in found.items()} == {
            name: ["parameters", "momenta", "velocities"] for name in ("item", "user")
        }
        assert found["user"]["parameters"].shape == (6, 2)
        assert_same(found, to_logical(state(0)), rtol=0)


def test_slots_per_row_are_mapped_too():
    config = FeatureConfig(TableConfig(6, 3, name="t"))
    ones = init(config, RowWiseAdagrad(0.1), jax.random.key(0))
    doubled = map_arrays(lambda x: 2 * x, ones)
    assert type(doubled.stacks[0]) is type(ones.stacks[0])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, ones)


@pytest.mark.parametrize("with_layout", [False, True])
def test_bfloat16_comes_back_from_a_numpy_file(tmp_path, with_layout):
    config = FeatureConfig(TableConfig(6, 3, name="t", dtype=jnp.bfloat16))
    one, other = (init(config, Adam(0.1), jax.random.key(i)) for i in range(2))
    arrays: dict[str, Any] = to_logical(one)["t"]
    np.savez(tmp_path / "t.npz", **arrays)
    with np.load(tmp_path / "t.npz") as file:
        assert file["parameters"].dtype == "V2"
        back = from_logical(other.layout if with_layout else other, {"t": dict(file)})
    found = np.asarray(back.table("t"))
    assert found.dtype == jnp.bfloat16
    assert found.tobytes() == np.asarray(one.table("t")).tobytes()


def test_words_are_refused_by_name():
    broken = jax.tree.map(mean, state(0, "packed"), state(1, "packed"))
    for use in (lambda s: lookup(s, *batch(0)), to_logical):
        with pytest.raises(
            TypeError, match=r"the stack of tables .*: packed.lines.dtype=float32"
        ):
            use(broken)


def test_what_map_arrays_refuses():
    other = init(FeatureConfig(TableConfig(6, 3)), Adam(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match=r"others\[0\].layout=.* must be that of the"):
        map_arrays(mean, state(0), other)
    with pytest.raises(ValueError, match=r"parameters of table 'item' has the sh"):
        map_arrays(lambda x: x[:3], state(0))
    with pytest.raises(TypeError, match=r"'item' has dtype=float16; it must be flo"):
        map_arrays(lambda x: x.astype(jnp.float16), state(0))
