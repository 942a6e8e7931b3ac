"""Exported lookups and updates, and a program that has only jax and NumPy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import sparse_adam
from sparse_adam import PackedTable, plan_update, sparse_adam_update
from sparse_adam._types import Storage
from sparse_adam.embedding import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    FeatureConfig,
    Optimizer,
    Ragged,
    RowWiseAdagrad,
    Sparse,
    TableConfig,
    apply_gradients,
    init,
    lookup,
    nearest,
    weights_only,
)
from tests.embedding.golden import normal

PLATFORMS = ("cpu", "tpu")
ITEM = TableConfig(50, 6, normal, combiner="mean", name="item")
CONFIG = {
    "user": FeatureConfig(TableConfig(20, 6, normal, name="user")),
    "history": FeatureConfig(ITEM),
    "basket": FeatureConfig(ITEM),
    "last": FeatureConfig(ITEM, max_sequence_length=2),
}

# Calls what `saved` wrote, with another batch each.
CALLER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparse_adam":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Blocker())
from pathlib import Path
import numpy as np
from jax import export, tree

for file in sorted(Path(sys.argv[1]).glob("*.bin")):
    with np.load(file.with_suffix(".npz")) as saved:
        arguments = dict(saved)
    exported = export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "tpu")
    found = exported.call(*arguments.values())
    np.savez(file.with_suffix(".found.npz"), *tree.leaves(found))
try:
    import sparse_adam
except ModuleNotFoundError:
    print("without sparse_adam")
"""


def exported(function: Any, *types: Any) -> Any:
    return export.export(jax.jit(function), platforms=PLATFORMS)(*types)


def shaped(x: Any, *shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or x.shape, x.dtype)


def raw_lookup(packed: bool) -> tuple[Any, Any, Any]:
    """Returns an exported lookup, arguments for it, and what is to be found."""
    table = jax.random.normal(jax.random.key(0), (40, 6))
    ids = np.array([[3, -1], [39, 40], [0, 3]], np.int32)
    (b,) = export.symbolic_shape("b")
    if not packed:
        function = exported(sparse_adam.lookup, shaped(table), shaped(ids, b, 2))
        return function, (table, ids), sparse_adam.lookup(table, ids)
    whole = PackedTable.pack(table)

    def look_up(lines: jax.Array, ids: jax.Array) -> jax.Array:
        return PackedTable(lines, whole.layout).lookup(ids)

    function = exported(look_up, shaped(whole.lines), shaped(ids, b, 2))
    return function, (whole.lines, ids), sparse_adam.lookup(table, ids)


def embedding_lookup(storage: Storage) -> tuple[Any, Any, Any]:
    """Does the same of a whole embedding, whose batch has ids in four forms."""
    state = init(CONFIG, Adam(), jax.random.key(0), storage=storage)
    arrays, structure = jax.tree.flatten(weights_only(state))
    rows = [[49], [], [7, 50, 7]]
    ragged = Ragged.from_rows(rows, size=6)
    given = (
        np.array([3, 19, -1], np.int32),
        np.array([[49, 1], [2, -1], [-1, -1]], np.int32),
        np.asarray(ragged.values, np.int32),
        np.asarray(ragged.row_splits, np.int32),
    )

    def look_up(table: Any, user: Any, history: Any, values: Any, splits: Any) -> Any:
        ids = {"user": user, "history": history, "basket": Ragged(values, splits)}
        ids["last"] = ids["basket"]
        return lookup(jax.tree.unflatten(structure, [table]), ids)

    b, n = export.symbolic_shape("b, n")
    types = [(b,), (b, 2), (n,), (b + 1,)]
    shapes = [shaped(x, *shape) for x, shape in zip(given, types, strict=True)]
    assert len(arrays) == 1
    function = exported(look_up, shaped(arrays[0]), *shapes)
    ids = {"user": given[0], "history": given[1], "basket": ragged, "last": ragged}
    return function, (arrays[0], *given), lookup(state, ids)


def update() -> tuple[Any, Any, Any]:
    state = [jnp.full((9, 4), value) for value in (1.0, 0.5, 0.25)]
    ids, grads = np.array([7, 2, 7, -1], np.int32), np.ones((4, 4), np.float32)
    arguments = (*state, ids, grads)

    def step(*arguments: Any) -> Any:
        return tuple(sparse_adam_update(*arguments))

    return exported(step, *map(shaped, arguments)), arguments, step(*arguments)


def search() -> tuple[Any, Any, Any]:
    table = jax.random.normal(jax.random.key(0), (40, 6))
    queries = np.asarray(-table[:3])
    (b,) = export.symbolic_shape("b")

    def find(table: jax.Array, queries: jax.Array) -> Any:
        return tuple(sparse_adam.nearest(table, queries, 5))

    function = exported(find, shaped(table), shaped(queries, b, 6))
    return function, (table, queries), find(table, jnp.asarray(queries))


def test_a_program_without_the_package_calls_what_was_exported(tmp_path: Path) -> None:
    cases = {
        "plain": raw_lookup(packed=False),
        "packed": raw_lookup(packed=True),
        "embedding": embedding_lookup("plain"),
        "embedding packed": embedding_lookup("packed"),
        "update": update(),
        "search": search(),
    }
    for name, (function, arguments, _) in cases.items():
        (tmp_path / f"{name}.bin").write_bytes(function.serialize())
        np.savez(tmp_path / f"{name}.npz", *arguments)
    done = subprocess.run(
        [sys.executable, "-c", CALLER, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "without sparse_adam\n"
    for name, (_, _, expected) in cases.items():
        with np.load(tmp_path / f"{name}.found.npz") as saved:
            found = list(dict(saved).values())
        for one, value in zip(found, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, value, rtol=1e-6, atol=1e-6)


def test_a_static_batch_takes_the_kernels_of_a_tpu_and_none_of_a_cpu() -> None:
    table = PackedTable.pack(*[jnp.ones((40, 6))] * 3)
    ids = jnp.array([3, 7])
    programs = export.export(
        jax.jit(lambda lines, ids: PackedTable(lines, table.layout).lookup(ids)),
        platforms=PLATFORMS,
    )(table.lines, ids)
    text = programs.mlir_module()
    assert text.count("@tpu_custom_call") == 1
    assert "@sparse_adam_cpu" not in text


def test_a_named_cpu_kernel_is_exported_for_programs_that_have_it() -> None:
    arguments = *[jnp.ones((9, 4))] * 3, jnp.array([7, 2]), jnp.ones((2, 4))

    def step(*arguments: Any) -> Any:
        return sparse_adam_update(*arguments, implementation="cpu")

    with pytest.raises(ValueError, match="no compatibility guarantees"):
        export.export(jax.jit(step))(*arguments)
    allowed = [export.DisabledSafetyCheck.custom_call("sparse_adam_cpu")]
    blob = export.export(jax.jit(step), disabled_checks=allowed)(*arguments).serialize()
    found = export.deserialize(blob).call(*arguments)
    for new, expected in zip(found, step(*arguments), strict=True):
        np.testing.assert_array_equal(new, expected)


def test_the_states_of_all_optimizers_are_registered() -> None:
    modules = [x for name, x in sys.modules.items() if "sparse_adam.embedding." in name]
    kinds = {x for module in modules for x in vars(module).values() if is_state(x)}
    assert len(kinds) >= 8
    for kind in kinds:
        with pytest.raises(ValueError, match="Duplicate serialization registration"):
            export.register_namedtuple_serialization(kind, serialized_name="another")


def is_state(value: Any) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, tuple)
        and hasattr(value, "_fields")
        and value.__name__.endswith("State")
    )


def test_the_types_of_the_package_are_written() -> None:
    packed = PackedTable.pack(jnp.ones((9, 4), jnp.bfloat16), jnp.ones((9, 4)))
    ragged = Ragged(jnp.array([1, 2]), jnp.array([0, 2]))
    sparse = Sparse(jnp.array([[0, 1]]), jnp.array([1]), (2, 3))
    plan = plan_update(jnp.array([1, 2]), num_rows=9)
    config, ids = FeatureConfig(TableConfig(9, 4, name="t")), jnp.array([1, 2])
    states = []
    optimizers: list[Optimizer] = [
        Adam(),
        Adam(bias_correction="row"),
        SGD(),
        Adagrad(),
        AdagradMomentum(),
    ]
    for optimizer in (*optimizers, FTRL(), RowWiseAdagrad()):
        states += init(config, optimizer, jax.random.key(0), storage="plain").stacks
    state = init(config, Adam(), jax.random.key(0), storage="plain")
    states += weights_only(state).stacks
    given = (packed, ragged, sparse, plan, states)
    blob = export.export(jax.jit(lambda x: x))(given).serialize()
    found = export.deserialize(blob).call(given)
    assert jax.tree.structure(found) == jax.tree.structure(given)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, given))

    queries = jnp.ones((2, 4))
    types = (state, queries)
    results = export.export(jax.jit(lambda state, x: nearest(state, "t", x, 1)))(*types)
    with pytest.raises(ValueError, match="an EmbeddingState can not be written"):
        results.serialize()
    found: Any = results.call(*types)
    assert found.ids.shape == (2, 1)
    gradients = jnp.ones((2, 4))
    step = export.export(jax.jit(apply_gradients))(state, ids, gradients)
    new: Any = step.call(state, ids, gradients)
    expected = apply_gradients(state, ids, gradients)
    np.testing.assert_allclose(new.table("t"), expected.table("t"), rtol=1e-6)
