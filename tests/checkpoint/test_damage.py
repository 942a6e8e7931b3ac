"""What was changed, truncated or lost is refused; the checkpoint before is taken."""

import json
import resource
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

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
    to_logical,
)
from sparse_adam.embedding.saved import checksums
from tests.checkpoint.states import (
    assert_same_bits,
    config,
    new,
    one_array,
    shapes,
)


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
