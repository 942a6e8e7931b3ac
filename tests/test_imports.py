"""Arrays as other libraries keep them: laid out by hand, or by TensorFlow itself."""

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import bias_corrected_learning_rate
from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    from_logical,
    init,
    to_logical,
)
from sparse_adam.imports import (
    StackedTable,
    from_jax_tpu_embedding,
    from_tensorflow,
    from_torch,
)
from tests.make_tensorflow_checkpoint import FILE as tensorflow_file  # noqa: N811


def ramp(*shape: int, start: float = 0) -> np.ndarray:
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def torch_state() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two embeddings in two groups; the second one has made no step."""
    weights = {"user": ramp(3, 2), "item": ramp(4, 2, start=50)}
    slots = {"step": 7, "exp_avg": ramp(3, 2, start=10), "exp_avg_sq": ramp(3, 2)}
    first = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-8, "params": [0]}
    groups = [first | {"maximize": False}, first | {"lr": 0.5, "params": [1]}]
    return weights, {"state": {0: slots}, "param_groups": groups}


def test_torch():
    weights, optimizer = torch_state()
    found = from_torch(weights, optimizer)
    assert found.steps == {"user": 7, "item": 0}
    assert found.options["item"]["learning_rate"] == 0.5
    assert np.array_equal(found.arrays["user"]["momenta"], ramp(3, 2, start=10))
    assert np.array_equal(found.arrays["user"]["velocities"], ramp(3, 2))
    assert np.array_equal(found.arrays["item"]["parameters"], weights["item"])
    assert not found.arrays["item"]["velocities"].any()
    with pytest.raises(ValueError, match=r"tables \['user'\], but .* has 2 parameters"):
        from_torch({"user": weights["user"]}, optimizer)
    with pytest.raises(ValueError, match=r"arrays of table 'user' have different"):
        from_torch(weights | {"user": ramp(5, 2)}, optimizer)
    optimizer["param_groups"][1]["maximize"] = True
    with pytest.raises(ValueError, match=r"maximizes table 'item'.*: negate"):
        from_torch(weights, optimizer)
    del optimizer["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match=r"not \['exp_avg'\]: it must be that"):
        from_torch(weights, optimizer)


def test_the_next_step_of_torch():
    """What SparseAdam does in its eighth step, worked out here in float64."""
    weights, optimizer = torch_state()
    found = from_torch(weights, optimizer)
    config = {
        name: FeatureConfig(
            TableConfig(len(w), 2, name=name, optimizer=Adam(**found.options[name]))
        )
        for name, w in weights.items()
    }
    state = from_logical(init(config, None, jax.random.key(0)), found.arrays)
    gradient = np.array([[0.25, -3.0]])
    rates = {
        name: bias_corrected_learning_rate(
            own["learning_rate"], found.steps[name] + 1, own["beta_1"], own["beta_2"]
        )
        for name, own in found.options.items()
    }
    state = apply_gradients(
        state,
        {"user": jnp.array([1]), "item": jnp.array([-1])},
        {"user": jnp.asarray(gradient, jnp.float32), "item": jnp.zeros((1, 2))},
        learning_rates=rates,
    )
    m = 0.8 * ramp(3, 2, start=10)[1:2] + 0.2 * gradient
    v = 0.99 * ramp(3, 2)[1:2] + 0.01 * gradient**2
    corrected = 0.1 * np.sqrt(1 - 0.99**8) / (1 - 0.8**8)
    expected = ramp(3, 2).astype(np.float64)
    expected[1:2] -= corrected * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(state.table("user"), expected, rtol=1e-6, atol=1e-6)


def test_tensors_of_torch():
    """They are detached, brought to the CPU, and bfloat16 is widened first."""

    class Tensor:
        dtype = "torch.bfloat16"

        def detach(self) -> Any:
            return SimpleNamespace(cpu=lambda: self)

        def float(self) -> Any:
            return SimpleNamespace(dtype="torch.float32", numpy=lambda: ramp(3, 2))

    weights, optimizer = torch_state()
    found = from_torch(weights | {"user": Tensor()}, optimizer)
    assert np.array_equal(found.arrays["user"]["parameters"], ramp(3, 2))


WRITTEN = json.loads(tensorflow_file.read_text())


@pytest.mark.parametrize("kind", ["checkpoint", "saver"])
def test_tensorflow(kind: str):
    """What TensorFlow has written, of tables whose names it escapes, and of others."""
    tables = WRITTEN["tables"]
    assert list(tables) == ["table_2", "user", "video", "video/a.Sb"]
    arrays = {name: np.array(value) for name, value in WRITTEN[kind].items()}
    found = from_tensorflow(arrays, tables)
    assert {
        name: {slot: array.tolist() for slot, array in own.items()}
        for name, own in found.items()
    } == tables
    assert all(next(iter(own)) == "parameters" for own in found.values())
    assert list(from_tensorflow(arrays, iter(["user"]))) == ["user"]
    with pytest.raises(ValueError, match=r"no weights of the tables \['item'\]; its"):
        from_tensorflow(arrays, ["user", "item"])


def test_tensorflow_into_a_state():
    arrays = {name: np.array(value) for name, value in WRITTEN["checkpoint"].items()}
    config = FeatureConfig(TableConfig(2, 1, name="user"))
    state = init(config, Adam(), jax.random.key(0))
    state = from_logical(state, from_tensorflow(arrays, state.tables))
    logical = to_logical(state)["user"]
    assert {slot: own.tolist() for slot, own in logical.items()} == (
        WRITTEN["tables"]["user"]
    )


def test_tensorflow_of_two_embeddings_or_of_sparsecores():
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    arrays = {"a/user" + end: ramp(3, 2), "b/user" + end: ramp(3, 2)}
    with pytest.raises(ValueError, match=r"'parameters' of table 'user' twice.*'b/us"):
        from_tensorflow(arrays, ["user"])
    arrays = {"a/_sparse_core_table_layouts" + end: np.array(b"x")}
    with pytest.raises(ValueError, match="are stacked for SparseCores"):
        from_tensorflow(arrays, ["user"])


class EmbeddingVariables(NamedTuple):
    table: Any
    slot: Any


def test_jax_tpu_embedding():
    """A stack on two shards, in the numbers r + 10 c of row r and column c.

    Table a of 5 rows has 8 rows in each shard and is not rotated; table b of 3 rows
    comes behind it and is rotated by one shard. Fillers are NaN.
    """
    stack = np.full((2, 16, 8), np.nan, np.float32)
    number = lambda r, base: [base + r, base + r + 10]  # noqa: E731
    for shard, row, table_row in (
        (0, 0, 0),
        (1, 0, 1),
        (0, 1, 2),
        (1, 1, 3),
        (0, 2, 4),
    ):
        stack[shard, row, :2] = number(table_row, 0)
    for shard, row, table_row in ((1, 8, 0), (0, 8, 1), (1, 9, 2)):
        stack[shard, row, :2] = number(table_row, 100)
    array = stack.reshape(32, 8)
    variables = {"a_b": EmbeddingVariables(array, (array + 1000, array + 2000))}
    tables = [
        StackedTable("a", 5, 2, stack="a_b"),
        StackedTable("b", 3, 2, "a_b", row_offset_in_shard=8, shard_rotation=1),
    ]
    found = from_jax_tpu_embedding(variables, tables, num_shards=2)
    for name, size, base in (("a", 5, 0), ("b", 3, 100)):
        rows = np.array([number(r, base) for r in range(size)], np.float32)
        assert np.array_equal(found[name]["parameters"], rows)
        assert np.array_equal(found[name]["momenta"], rows + 1000)
        assert np.array_equal(found[name]["velocities"], rows + 2000)
    with pytest.raises(ValueError, match=r"32 rows, which do not divide by num"):
        from_jax_tpu_embedding(variables, tables, 3)
    with pytest.raises(ValueError, match=r"8 parts of the shape \(4, 8\), too sm"):
        from_jax_tpu_embedding(variables, tables, 8)
    with pytest.raises(ValueError, match=r"has 2 slots, but slot_names=\('accumul"):
        from_jax_tpu_embedding(variables, tables, 2, ("accumulators",))
    with pytest.raises(ValueError, match="no stack 'c' of table 'c'"):
        from_jax_tpu_embedding(variables, [StackedTable("c", 5, 2)], 2)
