"""Checkpoints fit any storage, stacking, devices and vocabulary, or say why not."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

from sparse_adam.checkpoint import (
    CheckpointMismatchError,
    RestoreTables,
    SaveTables,
)
from sparse_adam.embedding import (
    SGD,
    Adagrad,
    Adam,
    FeatureConfig,
    RowWiseAdagrad,
    TableConfig,
    apply_gradients,
    from_logical,
    to_logical,
    weights_only,
)
from sparse_adam.embedding.saved import from_saved, targets, to_saved
from tests import programs
from tests.checkpoint.states import (
    ADAGRAD,
    FORMS,
    SIZES,
    assert_same_bits,
    config,
    is_packed,
    mesh,
    new,
    of_form,
    random_arrays,
    restored,
    saved,
    shapes,
    unpacked,
)


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
