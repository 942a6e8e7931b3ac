"""Tables of a mesh are made, loaded and read without a device that has all of one."""

import functools
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sparse_adam._types import Storage
from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    from_logical,
    init,
    map_arrays,
    to_logical,
)
from tests import programs
from tests.helpers import assert_bitwise_equal

V, D = 4096, 24
SIZES = {"item": V, "odd": 4091, "few": 5}


@functools.cache
def mesh(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def affine(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    """A product and a sum, which a compiler would contract into one rounding."""
    return jax.random.normal(key, shape, dtype) * 0.1 + 0.3


def on_host(key: jax.Array, shape: Any, dtype: Any) -> Any:
    """Needs the words of the key, and makes float64."""
    seed = np.asarray(jax.random.key_data(key))
    return np.random.default_rng(seed).standard_normal(shape)


def constant(key: jax.Array, shape: Any, dtype: Any) -> Any:
    del key
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def config(initializer: Any = affine) -> list[FeatureConfig]:
    return [
        FeatureConfig(TableConfig(size, D, initializer, name=name))
        for name, size in SIZES.items()
    ]


def start(
    spread: Mesh | None, initializer: Any = affine, storage: Storage = "plain"
) -> Any:
    key = jax.random.key(7)
    return init(config(initializer), Adam(), key, storage=storage, mesh=spread)


def assert_same_tables(one: Any, other: Any) -> None:
    one, other = to_logical(one), to_logical(other)
    assert one.keys() == other.keys()
    for name in one:
        for slot in one[name]:
            assert_bitwise_equal(one[name][slot], other[name][slot], f"{name}/{slot}")


def sizes(text: str) -> list[int]:
    """The elements of each array of a program."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_no_array_of_the_compiled_init_has_the_size_of_a_table(storage):
    stacks = jax.jit(
        lambda key: init(config(), Adam(), key, storage=storage, mesh=mesh()).stacks
    )
    compiled = programs.as_for_users(stacks.lower(jax.random.key(7)))
    whole = sum(SIZES.values()) * D
    assert max(sizes(compiled.as_text() or "")) < V * D
    memory: Any = compiled.memory_analysis()
    lines = 128 / (128 // 32 * 24) if storage == "packed" else 1
    assert memory.output_size_in_bytes < 3 * 4 * whole / 8 * 1.1 * lines
    assert memory.temp_size_in_bytes < 2 * 3 * 4 * whole / 8 * lines


@pytest.mark.parametrize(
    ("initializer", "kind"),
    [
        (affine, AxisType.Auto),
        (affine, AxisType.Explicit),
        (on_host, AxisType.Auto),
        (constant, AxisType.Auto),
    ],
)
def test_the_same_bits_as_on_one_device(initializer, kind):
    many = start(mesh(kind), initializer)
    assert_same_tables(many, start(None, initializer))
    for x in jax.tree.leaves(many):
        assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // 8}


SCRIPT = """
import jax
import numpy as np
from sparse_adam.embedding import SGD, FeatureConfig, TableConfig, init
draw = jax.nn.initializers
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
for own in (None, draw.he_normal(), draw.uniform(0.05)):
    config = FeatureConfig(TableConfig(1001, 24, own, name="a"))
    one, many = (
        np.asarray(init(config, SGD(), jax.random.key(7), mesh=where).table("a"))
        for where in (None, mesh)
    )
    assert one.tobytes() == many.tobytes(), own
"""


def test_the_same_bits_as_a_users_compiler_makes_them():
    """Those of these tests leaves out passes, and not every program alike."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_loaded_tables_are_sent_to_devices_by_parts():
    rng = np.random.default_rng(0)
    state = start(mesh(), storage="packed")
    arrays: Any = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), to_logical(state)
    )
    options: dict[str, Any]
    for like, options in ((state, {}), (state.layout, {"storage": "plain"})):
        new = from_logical(like, arrays, **options)
        found = to_logical(new)
        for name, own in arrays.items():
            for slot, x in own.items():
                assert_bitwise_equal(found[name][slot], x)
        for x in jax.tree.leaves(new):
            assert {s.data.nbytes for s in x.addressable_shards} == {x.nbytes // 8}
    part = from_logical(state, {"odd": {"momenta": arrays["odd"]["momenta"]}})
    found, old = to_logical(part), to_logical(state)
    assert_bitwise_equal(found["odd"]["momenta"], arrays["odd"]["momenta"])
    assert_bitwise_equal(found["odd"]["parameters"], old["odd"]["parameters"])
    assert_bitwise_equal(found["item"]["momenta"], old["item"]["momenta"])


def test_read_tables_are_spread_where_their_rows_divide():
    state = start(mesh())
    item = state.table("item")
    assert {s.data.shape for s in item.addressable_shards} == {(V // 8, D)}
    assert_bitwise_equal(
        to_logical(map_arrays(lambda x: -x, state))["odd"]["parameters"],
        -np.asarray(state.table("odd")),
    )
    again = from_logical(start(mesh(), constant), to_logical(state))
    assert_same_tables(again, state)
