"""The code in the README and the documentation runs as it stands."""

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("checkpoints.md", 40),
        ("embedding.md", 20),
        ("packed.md", 15),
        ("rules.md", 30),
        ("semantics.md", 5),
        ("serving.md", 15),
        ("sharding.md", 15),
        ("start/jax.md", 15),
        ("start/jax_tpu_embedding.md", 8),
        ("start/pytorch.md", 12),
        ("start/tensorflow.md", 10),
    ],
)
def test_examples_in_docs_print_what_they_say(name: str, examples: int) -> None:
    failed, run = doctest.testfile(str(ROOT / "docs" / name), module_relative=False)
    assert run > examples
    assert not failed


def test_readme_code_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, README.name, "exec"), names)
    assert names["table"].is_deleted()  # donated
    step, state, loss = (names[name] for name in ("train_step", "state", "loss"))
    before = jax.random.normal(jax.random.key(0), (1000, 128))
    changed = np.flatnonzero(np.any(np.asarray(state.table) != before, axis=1))
    assert changed.tolist() == [3, 14]
    assert step(state, jnp.array([3, 14, 3, -1]), jnp.ones(4), 1e-2)[0] < loss


@pytest.mark.parametrize("name", ["one_table", "recommender"])
def test_notebooks_run(name: str) -> None:
    """Their own asserts say what must come out."""
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    names: dict[str, Any] = {}
    with (
        jax.numpy_dtype_promotion("standard"),  # as in a program of a reader's
        jax.numpy_rank_promotion("allow"),
        matplotlib.rc_context({"backend": "agg"}),
    ):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), path.name, "exec"), names)
        matplotlib.pyplot.close("all")


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode and not done.stderr, done.stderr
    pages = {x.name: x.read_text() for x in (tmp_path / "site" / "api").glob("*.html")}
    assert 'id="sparse_adam.sparse_adam_update"' in pages["update.html"]
    assert pages["update.html"].count('<math xmlns="') > 10
    for name, page in pages.items():
        assert "math:" not in page, name  # a formula that stays as docstrings have it
        assert "<blockquote>" not in page, name  # of a text that begins with >


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("update", "sparse_adam"),
        ("embedding", "sparse_adam.embedding"),
        ("rules", "sparse_adam.rules"),
        ("reference", "sparse_adam.reference"),
    ],
)
def test_every_public_name_has_its_place_in_the_api(page: str, module: str) -> None:
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    found = importlib.import_module(module)
    names = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    ]
    elsewhere = vars(importlib.import_module("sparse_adam.embedding"))
    missing = [
        name
        for name in names
        if f"::: {module}.{name}\n" not in text
        and not (module == "sparse_adam" and name in elsewhere)
    ]
    assert names and not missing
