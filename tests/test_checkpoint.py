"""Checkpoints fit any storage, stacking, devices and vocabulary, or say why not."""

import dataclasses
import functools
import itertools
import json
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_adam import PackedTable
from sparse_adam.checkpoint import (
    CheckpointMismatchError,
    CorruptCheckpointError,
    RestoreArrays,
    RestoreTables,
    SaveArrays,
    SaveTables,
    restore_latest,
)
from sparse_adam.embedding import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingState,
    FeatureConfig,
    RowWiseAdagrad,
    TableConfig,
    apply_gradients,
    from_logical,
    init,
    to_logical,
    weights_only,
)
from sparse_adam.embedding.saved import checksums, from_saved, targets, to_saved
from tests import programs

SIZES = {"user": 13, "item": 40}  # 40 rows divide by the number of devices
ADAGRAD = Adagrad(0.1)
FORMS = list(itertools.product(("plain", "packed"), (True, False), (1, 2, 8)))


def config(sizes: Mapping[str, int] = SIZES, **options: Any) -> dict[str, Any]:
    return {
        name: FeatureConfig(TableConfig(size, 2, name=name, **options))
        for name, size in sizes.items()
    }


@functools.cache
def mesh(count: int, kind: AxisType = AxisType.Auto) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("x",), axis_types=(kind,), devices=devices)


def new(
    seed: int = 0,
    features: Any = None,
    optimizer: Any = ADAGRAD,
    **how: Any,
) -> EmbeddingState:
    features = config() if features is None else features
    return init(features, optimizer, jax.random.key(seed), **how)


def shapes(*arguments: Any, **how: Any) -> EmbeddingState:
    return jax.eval_shape(functools.partial(new, *arguments, **how))


def of_form(storage: str, stack: bool, count: int) -> EmbeddingState:
    on = mesh(count) if count > 1 else None
    return shapes(storage=storage, stack=stack, mesh=on)


def random_arrays(like: EmbeddingState) -> Any:
    """Weights and slots by table that differ in every number."""
    rng = np.random.default_rng(0)
    return {
        table.name: {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in zip(table.array_names, table.shapes, strict=True)
        }
        for table in like.layout.tables
    }


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(folder: Path, state: EmbeddingState, step: int = 0) -> Path:
    with ocp.CheckpointManager(folder) as manager:
        assert manager.save(step, args=SaveTables(state))
    return folder


def restored(folder: Path, like: EmbeddingState, **how: Any) -> EmbeddingState:
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(0, args=RestoreTables(like, **how))


def unpacked(state: EmbeddingState) -> list[tuple[jax.Array, ...]]:
    return [tuple(x.unpack() if is_packed(x) else x) for x in state.stacks]


def is_packed(stored: Any) -> bool:
    return isinstance(stored, PackedTable)


def test_every_form_is_restored_in_every_other(tmp_path):
    """Forms on as many devices write the same; what they write, each form reads."""
    likes = [of_form(*form) for form in FORMS]
    logical = random_arrays(likes[0])
    states = {}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveTables(from_logical(likes[0].layout, logical)))
        for step, (form, like) in enumerate(zip(FORMS, likes, strict=True), 1):
            storage, stack, count = form
            state = manager.restore(0, args=RestoreTables(like))
            assert len(state.stacks) == (1 if stack else 2)
            for x in jax.tree.leaves(state):
                assert len(x.sharding.device_set) == count
                assert count == 1 or not x.sharding.is_fully_replicated
                assert x.committed == (count > 1)  # as those of init
            if storage == "plain":
                assert_same_bits(logical, to_logical(state))
            else:
                assert all(map(is_packed, state.stacks))
                plain = states["plain", stack, count]
                assert_same_bits(unpacked(plain), unpacked(state))
            manager.save(step, args=SaveTables(state))
            states[form] = state
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, (_, _, count) in enumerate(FORMS, 1):
            raw = manager.restore(step, args=ocp.args.StandardRestore())
            for name, rows in SIZES.items():
                rest = {slot: x[rows:] for slot, x in raw[name].items()}
                assert not any(np.any(x) for x in rest.values())
                assert {len(x) for x in rest.values()} == {-rows % count}
                raw[name] = {slot: x[:rows] for slot, x in raw[name].items()}
            assert_same_bits(logical, raw)
    with ocp.CheckpointManager(tmp_path) as manager:
        for count in (2, 8):
            step = 1 + FORMS.index(("plain", True, count))
            for state in states.values():
                found = manager.restore(step, args=RestoreTables(state))
                assert_same_bits(found, state)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_no_device_has_a_whole_table_on_the_way(storage):
    sizes = {"user": 4001, "item": 8000}
    like = shapes(features=config(sizes), storage=storage, mesh=mesh(8))
    place = targets(like)["user"]["parameters"].sharding
    spread = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like
    )
    whole = sum(2 * 2 * 4 * size for size in sizes.values())  # float32, with a slot
    for function, given in (
        (to_saved, spread),
        (functools.partial(from_saved, like, step=0), targets(like)),
    ):
        compiled = programs.as_for_users(jax.jit(function).lower(given))
        memory: Any = compiled.memory_analysis()  # of one device
        assert memory.output_size_in_bytes < whole / 7
        assert memory.temp_size_in_bytes < whole / 3
        text = compiled.as_text() or ""
        assert "all-to-all" in text
        assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.parametrize("count", [1, 8])
def test_a_grown_vocabulary(tmp_path, count):
    """Rows that were not saved, and tables, are those that init makes of the key."""
    on = mesh(count, AxisType.Explicit)
    old = shapes(features=config({"user": 13, "item": 6}), mesh=on)
    arrays = random_arrays(old)
    saved(tmp_path, from_logical(old.layout, arrays))
    features = config({"new": 5, "user": 30, "item": 6})
    like = shapes(features=features, mesh=on)
    state = restored(tmp_path, like, key=jax.random.key(7))
    expected = jax.tree.map(np.array, to_logical(new(7, features)))
    for name, own in arrays.items():
        for slot, array in own.items():
            expected[name][slot][: len(array)] = array
    assert_same_bits(expected, to_logical(state))
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert x.shape == y.shape and len(x.sharding.device_set) == count


def test_what_does_not_fit_is_refused(tmp_path):
    state = new(features=config({"user": 13, "item": 6}))
    saved(tmp_path, state)

    def refused(words, features, optimizer: Any = ADAGRAD, **how):
        like = shapes(features=features, optimizer=optimizer)
        with pytest.raises(CheckpointMismatchError, match=words):
            restored(tmp_path, like, **how)

    refused(
        r"lacks rows 13 to 13 of table 'user': pass key=",
        config({"user": 14}),
        drop=["item"],
    )
    refused(
        r"has the table 'item', which is none of \['user'\]: pass drop=\['item'\]",
        config({"user": 13}),
    )
    refused(
        r"lacks table 'new', but has \['item', 'user'\]: pass key=",
        config({"user": 13, "item": 6, "new": 2}),
    )
    refused(
        r"13 rows of table 'user', more than its vocabulary_size=12",
        config({"user": 12, "item": 6}),
        key=jax.random.key(0),
    )
    refused(
        r"'accumulators' of table 'item', but its optimizer has \['parameters'\]: "
        r"pass drop=\['item/accumulators'\]",
        config({"user": 13, "item": 6}),
        SGD(),
    )
    refused(
        r"lacks 'momenta' of table 'item', but has \['accumulators', 'param",
        config({"user": 13, "item": 6}),
        Adam(),
        drop=["item/accumulators", "user/accumulators"],
    )
    wide = {"user": FeatureConfig(TableConfig(13, 3, name="user"))}
    refused(
        r"of table 'user' with rows of the shape \(2,\); they must be \(3,\)",
        wide,
        drop=["item"],
    )


def test_what_is_dropped_and_what_is_made_anew(tmp_path):
    state = from_logical(new(), random_arrays(new()))
    saved(tmp_path, state)
    like = shapes(features=config({"user": 13}), optimizer=Adam())
    drop, key = ["item", "user/accumulators"], jax.random.key(0)
    found = to_logical(restored(tmp_path, like, drop=drop, key=key))["user"]
    assert list(found) == ["parameters", "momenta", "velocities"]
    assert np.array_equal(found["parameters"], state.table("user"))
    assert not found["momenta"].any() and not found["velocities"].any()
    served = restored(tmp_path, weights_only(state))  # asks for no slots
    assert_same_bits(to_logical(weights_only(state)), to_logical(served))


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_bfloat16_and_its_slots_keep_every_bit(tmp_path, storage):
    halves = config(dtype=jnp.bfloat16, slot_dtype=jnp.bfloat16)
    like = shapes(features=halves, storage=storage)
    state = from_logical(like.layout, random_arrays(like), storage=storage)
    saved(tmp_path, state)
    found = to_logical(restored(tmp_path, like))
    assert found["user"]["parameters"].dtype == jnp.bfloat16
    assert_same_bits(to_logical(state), found)
    floats = to_logical(restored(tmp_path, shapes(storage=storage)))
    wider = jax.tree.map(lambda x: np.asarray(x, np.float32), to_logical(state))
    assert_same_bits(wider, floats)


def test_a_slot_per_row(tmp_path):
    optimizer = RowWiseAdagrad(0.1)
    like = shapes(optimizer=optimizer)
    arrays = random_arrays(like)
    saved(tmp_path, from_logical(like.layout, arrays))
    on_two = shapes(optimizer=optimizer, mesh=mesh(2))
    assert_same_bits(arrays, to_logical(restored(tmp_path, on_two)))


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_training_goes_on_while_a_state_is_written(tmp_path, storage):
    """The update donates what is saved, and works in place, before it is written."""
    features = {"user": FeatureConfig(TableConfig(2**18, 2, name="user"))}
    state = new(features=features, storage=storage)
    before = jax.tree.map(lambda x: np.array(x, copy=True), to_logical(state))
    ids = {"user": jnp.arange(2**18)}
    gradients = {"user": jnp.ones((2**18, 2))}
    step = jax.jit(
        lambda state: apply_gradients(state, ids, gradients), donate_argnums=0
    )
    compiled = step.lower(state).compile()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveTables(state))
        assert manager.is_saving_in_progress()
        given = jax.tree.leaves(state)[0]
        state = compiled(state)
        assert given.is_deleted()
        manager.wait_until_finished()
        like = shapes(features=features, storage=storage)
        found = to_logical(manager.restore(0, args=RestoreTables(like)))
    assert_same_bits(before, found)
    assert not np.array_equal(found["user"]["parameters"], state.table("user"))


def data_files(folder: Path) -> list[Path]:
    return [x for x in folder.rglob("*") if x.is_file() and x.parent.name == "d"]


def truncate(folder: Path) -> None:
    for file in data_files(folder):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(folder: Path) -> None:
    for file in data_files(folder):
        file.unlink()


def garble(folder: Path) -> None:
    (folder / "_METADATA").write_text("{")


def change(folder: Path) -> None:
    """Saves other numbers under the metadata of the old ones."""
    metadata = (folder / "_METADATA").read_bytes()
    arrays = ocp.StandardCheckpointer().restore(folder.absolute())
    arrays["user"]["parameters"] = arrays["user"]["parameters"].at[3, 1].add(1)
    shutil.rmtree(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), arrays)
    (folder / "_METADATA").write_bytes(metadata)


def one_array(seed: int = 0) -> EmbeddingState:
    """Orbax complains, later, of other arrays that it was reading at an error."""
    return new(seed, config({"user": 13}), SGD())


@pytest.mark.parametrize("harm", [truncate, remove, garble, change])
def test_a_broken_checkpoint_is_refused_and_the_one_before_is_taken(tmp_path, harm):
    states = [one_array(0), one_array(1)]
    with ocp.CheckpointManager(tmp_path) as manager:
        for step, state in enumerate(states):
            manager.save(step, args=SaveTables(state))
    harm(tmp_path / "1" / "default")
    args = RestoreTables(states[0])
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(CorruptCheckpointError, match=r"the checkpoint in .*1"):
            manager.restore(1, args=args)
        with pytest.warns(UserWarning, match=r"of step 1 in .* cannot"):
            found = restore_latest(manager, args)
        assert found is not None and (found.step, found.unreadable) == (0, (1,))
        assert_same_bits(to_logical(found.items), to_logical(states[0]))
        for step in found.unreadable:
            manager.delete(step)
        assert manager.save(1, args=SaveTables(states[1]))
        found = restore_latest(manager, args)
        assert found is not None and found.step == 1


def test_restore_latest_does_not_hide_what_is_wrong(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        assert restore_latest(manager, RestoreTables(one_array())) is None
        manager.save(0, args=SaveTables(one_array()))
        with pytest.raises(CheckpointMismatchError, match="pass drop="):
            restore_latest(
                manager, RestoreTables(shapes(features=config({"item": 13})))
            )
        truncate(tmp_path / "0" / "default")
        with (
            pytest.warns(UserWarning, match="of step 0"),
            pytest.raises(CorruptCheckpointError, match=r"none of .* steps \[0\]"),
        ):
            restore_latest(manager, RestoreTables(one_array()))


def test_a_plain_checkpoint_of_logical_arrays_is_read(tmp_path):
    state = from_logical(new(), random_arrays(new()))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(to_logical(state)))
    found = restored(tmp_path, shapes(storage="packed"))
    assert_same_bits(to_logical(state), to_logical(found))


def halving(step: Any) -> Any:
    return 0.1 * 0.5**step


@pytest.mark.parametrize("count", [1, 2])
def test_the_step_is_restored(tmp_path, count):
    on = mesh(count) if count > 1 else None
    optimizer = Adam(halving)
    state = dataclasses.replace(new(optimizer=optimizer), step=jnp.int32(5))
    saved(tmp_path, state)
    like = shapes(optimizer=optimizer, mesh=on)
    assert restored(tmp_path, like).step == 5
    assert restored(tmp_path, shapes(optimizer=Adam(0.1))).step is None


def test_a_checkpoint_without_the_step_is_refused_without_a_key(tmp_path):
    like = shapes(optimizer=Adam(halving))
    saved(tmp_path, new(optimizer=Adam(0.1)))
    with pytest.raises(CheckpointMismatchError, match=r"lacks the step, .*'user'"):
        restored(tmp_path, like)
    assert restored(tmp_path, like, key=jax.random.key(1)).step == 0


def test_the_step_of_a_plain_checkpoint_is_read(tmp_path):
    optimizer = Adam(halving)
    state = dataclasses.replace(new(optimizer=optimizer), step=jnp.int32(5))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(to_logical(state)))
    found = restored(tmp_path, shapes(optimizer=optimizer))
    assert found.step == 5
    assert_same_bits(to_logical(found), to_logical(state))


@pytest.mark.parametrize("count", [1, 8])
def test_an_average_that_is_new_begins_as_the_weights(tmp_path, count):
    on = mesh(count) if count > 1 else None
    state = new()
    saved(tmp_path, state)
    features, optimizer = config(SIZES | {"user": 20}), Adagrad(0.1, ema_decay=0.5)
    like = shapes(features=features, optimizer=optimizer, mesh=on)
    found = restored(tmp_path, like, key=jax.random.key(1))
    for name in SIZES:
        weights = np.asarray(found.table(name))
        np.testing.assert_array_equal(found.slots(name)["ema"], weights)
        old = np.asarray(state.table(name))
        np.testing.assert_array_equal(weights[: len(old)], old)


def dense() -> Any:
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": [jnp.ones(3, jnp.bfloat16)]}
    others = {"mask": jnp.array([True, False]), "host": np.array([1.1, 2.2]), "n": 3}
    return params, optax.adam(optax.linear_schedule(0.1, 0.2, 3)).init(params), others


@pytest.mark.parametrize("count", [1, 2])
def test_other_arrays_are_restored_as_they_are_wanted(tmp_path, count):
    tree = dense()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveArrays(tree))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(tmp_path) as manager:
        place = NamedSharding(mesh(count), PartitionSpec())
        like = jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
                if isinstance(x, jax.Array)
                else x
            ),
            tree,
        )
        for step in (0, 1):
            found = manager.restore(step, args=RestoreArrays(like))
            assert jax.tree.structure(found) == jax.tree.structure(tree)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
                assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
                assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
                assert not isinstance(x, jax.Array) or x.sharding == place
                assert np.asarray(x).dtype == np.asarray(y).dtype
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        narrow = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
        like[0]["w"] = narrow
        found = manager.restore(0, args=RestoreArrays(like))[0]["w"]
        assert found.dtype == jnp.bfloat16 and np.array_equal(found, tree[0]["w"])


def test_other_arrays_than_were_saved_are_refused(tmp_path):
    arrays = {"w": jnp.ones((2, 3)), "b": [jnp.ones(4)]}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=SaveArrays(arrays))
        for like, words in (
            ({**arrays, "w": jnp.ones((3, 2))}, r"\(2, 3\) at 'w', .* \(3, 2\)"),
            ({"w": arrays["w"]}, r"\(4,\) at 'b/0', and like has nothing"),
            ({**arrays, "c": jnp.ones(1)}, r"has nothing at 'c', and like has an"),
        ):
            with pytest.raises(CheckpointMismatchError, match=words):
                restore_latest(manager, RestoreArrays(like))
    with pytest.raises(TypeError, match=r"keys at 'a/key': pass jax\.random"):
        SaveArrays({"a": {"key": jax.random.key(0)}})


@pytest.mark.parametrize("item", ["tables", "arrays"])
def test_no_file_can_change_without_an_error(tmp_path, item):
    """Some files are not read, and a changed one of them changes nothing."""
    state, array = one_array(), {"w": jnp.arange(99.0) ** 0.5}
    save = SaveTables(state) if item == "tables" else SaveArrays(array)
    args = RestoreTables(state) if item == "tables" else RestoreArrays(array)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=save)
    expected = to_logical(state) if item == "tables" else array
    folder = tmp_path / "0" / "default"
    listed = set(json.loads((folder / "files.json").read_text()))
    files = {str(x.relative_to(folder)): x for x in folder.rglob("*") if x.is_file()}
    assert listed == set(files) - {"files.json", "commit_success.txt"}
    rng = np.random.default_rng(0)
    with ocp.CheckpointManager(tmp_path) as manager:
        for name, file in files.items():
            data = file.read_bytes()
            changed = bytearray(data)
            changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            for other in (changed, data[: len(data) // 2], None):
                file.write_bytes(other) if other is not None else file.unlink()
                try:
                    found = manager.restore(0, args=args)
                except CorruptCheckpointError as error:
                    assert "the checkpoint in" in str(error)
                    assert (
                        other is changed or name == "files.json" or name in str(error)
                    )
                else:
                    numbers = other is changed and file.parent.name == "d"
                    assert name not in listed or numbers
                    arrays = to_logical(found) if item == "tables" else found
                    assert_same_bits(arrays, expected)
                file.write_bytes(data)


@pytest.mark.parametrize("dtype", ["?", "int8", "bfloat16", "f4", "f8", "i8", "c8"])
def test_a_checksum_tells_the_last_bit(dtype):
    array = np.array([[1, 0, 1]], jnp.dtype(dtype))
    other = array.copy()
    other.view(np.uint8)[0, 0] ^= 1
    assert checksums(array) != checksums(other)
    if dtype not in ("f8", "i8"):  # which JAX has not by default
        assert checksums(jnp.asarray(array)) == checksums(array)


def test_a_full_disk_is_told_by_the_next_call_and_takes_nothing_away(tmp_path):
    """A limit of the size of files is as a disk without room for them."""
    states = [new(seed, config({"user": 999}), SGD()) for seed in range(2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
    args = RestoreTables(states[0])
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(0, args=SaveTables(states[0]))
        manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            assert manager.save(1, args=SaveTables(states[1]))
            with pytest.raises(ValueError, match="File too large"):
                manager.save(2, args=SaveTables(states[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        found = restore_latest(manager, args)
        assert found is not None and (found.step, found.unreadable) == (0, ())
        assert_same_bits(to_logical(found.items), to_logical(states[0]))
        assert manager.save(1, args=SaveTables(states[1]))
        found = restore_latest(manager, args)
        assert found is not None and found.step == 1
    assert [x.name for x in tmp_path.iterdir()] == ["1"]
