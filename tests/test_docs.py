"""The code in the README and the documentation runs as it stands."""

import doctest
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
        ("sharding.md", 15),
    ],
)
def test_examples_in_docs_print_what_they_say(name: str, examples: int) -> None:
    failed, run = doctest.testfile(str(ROOT / "docs" / name), module_relative=False)
    assert run > examples
    assert not failed


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(blocks[0], README.name, "exec"), names)
    first = dict(names)
    assert first["table"].is_deleted()  # donated
    for block in blocks[1:]:
        exec(compile(block, README.name, "exec"), names)
    step, state, loss = (first[name] for name in ("train_step", "state", "loss"))
    before = jax.random.normal(jax.random.key(0), (1000, 128))
    changed = np.flatnonzero(np.any(np.asarray(state.table) != before, axis=1))
    assert changed.tolist() == [3, 14]
    assert step(state, jnp.array([3, 14, 3, -1]), jnp.ones(4), 1e-2)[0] < loss

    adagrad, accumulators = names["adagrad"]
    assert np.flatnonzero(np.any(adagrad != 1, axis=1)).tolist() == [3, 14]
    assert np.allclose(accumulators[np.array([3, 14, 0]), 0], [4.1, 1.1, 0.1])

    batch = {"history": jnp.array([[1, 2, -1]]), "candidate": jnp.array([7])}
    step, labels = names["embedding_step"], jnp.ones((1,))
    embeddings, before = step(names["state"], batch, labels)
    for _ in range(5):
        embeddings, loss = step(embeddings, batch, labels)
    assert loss < before
