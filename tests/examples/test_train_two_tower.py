"""The example runs as a user runs it: as a script, in a process of its own."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from click.testing import CliRunner
from jax.sharding import AxisType
from rich.console import Console

from sparse_adam.embedding import to_logical
from tests import programs
from tests.embedding import hlo

SCRIPT = Path(__file__).parents[2] / "examples" / "train_two_tower.py"
STEPS = 400


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--quick", f"--out={out}", *options],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(out: Path, *options: str) -> str:
    """Runs the example to its end and returns what it printed."""
    process = start(out, *options)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a run from beginning to end, and what it printed."""
    out = tmp_path_factory.mktemp("two_tower") / "unbroken"
    return out, finish(out)


def last_checkpoint(out: Path) -> dict[str, Any]:
    (checkpoints,) = out.glob("checkpoints-*")
    with ocp.CheckpointManager(checkpoints.absolute()) as manager:
        assert manager.latest_step() == STEPS
        raw = ocp.args.StandardRestore()
        args = ocp.args.Composite(tables=raw, others=raw)
        return dict(manager.restore(STEPS, args=args))


def test_learns_what_comes_next(unbroken: tuple[Path, str]) -> None:
    out, printed = unbroken
    assert "continuing" not in printed
    run = last_checkpoint(out)["others"]
    assert np.isfinite(run["losses"]).all()
    assert run["losses"][-50:].mean() < 0.8 * run["losses"][:50].mean()
    (popular,) = map(float, re.findall(r"popular items\D+(0\.\d+)", printed))
    assert run["recalls"][-1] > 0.4 > 3 * popular
    assert run["recalls"][-1] > run["recalls"][0]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import_module = importlib.import_module
    return import_module("train_two_tower"), import_module("interactions")


def test_reads_data(modules: Any, tmp_path: Path) -> None:
    example, interactions = modules
    path = tmp_path / "log.csv"
    rows = ["zoe,tea,drinks", "abe,pan,kitchen", "zoe,pan,kitchen", "abe,tea,drinks"]
    path.write_text("\n".join(["user,item,category", *rows]))
    data = interactions.read_interactions(path)
    assert [x.tolist() for x in (data.users, data.items, data.categories)] == [
        [0, 0, 1, 1],
        [0, 1, 1, 0],
        [1, 0],
    ]
    path.write_text("user,item\nzoe,tea\nabe,tea\n")
    assert interactions.read_interactions(path).num_categories == 1
    out = ["--out", str(tmp_path / "out")]
    lonely = CliRunner().invoke(example.main, ["--data", str(path), *out])
    assert lonely.exit_code == 1
    assert "no user has two events or more" in lonely.output
    path.write_text("name\nzoe\n")
    with pytest.raises(ValueError, match="must have a header with `user` and `item`"):
        interactions.read_interactions(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must have a header with `user` and `item`"),
        (b"name\nzoe\n", "must have a header with `user` and `item`"),
        (b"user,item\nzoe,tea\nabe\n", "row 2 below the header lacks user or item"),
        (b"user,item\nzoe,\xff\n", "is not a CSV file in UTF-8"),
        (b'user,item\nzoe,"' + b"x" * 200_000, "is not a CSV file in UTF-8: field"),
    ],
)
def test_a_bad_file_is_a_sentence(
    modules: Any, tmp_path: Path, content: bytes, words: str
) -> None:
    example, _ = modules
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    options = ["--data", str(path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(example.main, options)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert words in done.output and str(path) in done.output


def test_devices_train_as_one_and_go_on_from_each_others_checkpoints(
    modules: Any, tmp_path: Path
) -> None:
    example, interactions = modules
    checkpoints = importlib.import_module("checkpoints")
    settings = example.Settings(
        users=60, items=30, categories=5, dim=8, hidden=8, batch=16, history=3
    )
    settings = dataclasses.replace(
        settings, steps=4, steps_per_call=2, steps_per_checkpoint=2
    )
    data = interactions.make_interactions(60, 30, 5, seed=0)
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=kinds, devices=jax.devices()[:2])

    def train(name: str, mesh: Any, again_from: int | None = None) -> Any:
        with checkpoints.open_checkpoints(tmp_path / name, settings, "") as saved:
            if again_from is not None:
                saved.delete(settings.steps)
                assert saved.latest_step() == again_from
            return example.train(data, settings, saved, Console(quiet=True), mesh)

    def check(run: Any) -> None:
        for x, y in zip(logical(run), logical(one), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)

    def logical(run: Any) -> list[Any]:
        tables = to_logical(run.model.embedding)
        return jax.tree.leaves((example.without_tables(run), tables))

    one = train("one", None)
    many = train("many", mesh)
    assert len(jax.tree.leaves(many.model.embedding)[0].sharding.device_set) == 2
    check(many)
    check(train("many", None, again_from=2))


def test_options_for_a_coordinator_go_together(modules: Any) -> None:
    done = CliRunner().invoke(modules[0].main, ["--coordinator", "localhost:1"])
    assert done.exit_code == 1
    assert "--coordinator, --processes and --process-id go together" in done.output


def test_a_step_does_nothing_of_the_size_of_a_table(modules: Any) -> None:
    example, interactions = modules
    settings = example.Settings(users=7001, items=5003, categories=1009, batch=64)
    shop = (settings.users, settings.items, settings.categories)
    data = interactions.make_interactions(*shop, seed=0)
    drawn_from, _ = interactions.split(data, settings.history)
    drawn_from = interactions.put_on_device(drawn_from, data)
    model = example.new_model(settings, data)
    arguments = (model, drawn_from, jnp.arange(2))
    compiled = programs.as_for_users(
        example.train_steps.lower(*arguments, settings=settings)
    )
    text = programs.text(compiled)
    stacks = model.embedding.layout.stacks
    assert len(stacks) == 2  # users and items are as wide as each other
    for stack in stacks:
        assert f"f32[{stack.num_rows}," in text
        assert hlo.dense_work(text, stack.num_rows) == set()
    memory = programs.memory(compiled)
    tables = sum(x.nbytes for x in jax.tree.leaves(model.embedding))
    assert memory.alias_size_in_bytes >= tables
    assert memory.temp_size_in_bytes < tables / 2


def test_examples_to_train_on_and_to_test_on(modules: Any) -> None:
    _, interactions = modules
    data = interactions.Interactions(
        users=np.array([0, 0, 0, 1, 2, 2], np.int32),
        items=np.array([5, 6, 7, 8, 9, 5], np.int32),
        categories=np.zeros(10, np.int32),
        num_users=3,
    )
    train, test = interactions.split(data, 2)
    assert [x.tolist() for x in dataclasses.astuple(train)] == [
        [0, 0, 2],
        [[-1, -1], [5, -1], [-1, -1]],
        [5, 6, 9],
    ]
    assert [x.tolist() for x in dataclasses.astuple(test)] == [
        [0, 2],
        [[6, 5], [9, -1]],
        [7, 5],
    ]
