"""Tables and slots from the checkpoints of other libraries, by NumPy alone.

Each function takes arrays as the other library keeps them, and returns them by table
name as `to_logical` does, for `from_logical`:

| from | function |
|---|---|
| `torch.optim.SparseAdam` and `torch.nn.Embedding` | `from_torch` |
| TensorFlow's `TPUEmbedding` | `from_tensorflow` |
| jax-tpu-embedding's `EmbeddingVariables` | `from_jax_tpu_embedding` |

None imports the library; what they are given may be its tensors.
"""

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, dict[str, np.ndarray]]


class TorchTables(NamedTuple):
    """What `from_torch` found.

    Attributes:
        arrays: by table name `parameters`, `momenta` and `velocities`, `[V, D]`.
        steps: by table name how many steps its parameter has made.
        options: by table name the arguments of an `Adam` that goes on as torch would,
            with a rate corrected by the step; see `from_torch`.
    """

    arrays: Arrays
    steps: dict[str, int]
    options: dict[str, dict[str, Any]]


def from_torch(
    weights: Mapping[str, Any], optimizer_state: Mapping[str, Any]
) -> TorchTables:
    r"""Reads `nn.Embedding` weights and the state of `torch.optim.SparseAdam`.

    torch's step number :math:`t` of a parameter, 1 for its first, is

    .. math::

        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \cdot \frac{m}{\sqrt{v} + \epsilon}

    in the rows of the batch: epsilon outside of the root, and one step for all rows. So
    the `Adam` of `options` has `sum_inside_sqrt=False`, and each update needs the rate
    `bias_corrected_learning_rate(rate, steps + k)` at the k-th step after the import,
    counted from 1.

    Args:
        weights: by the name that a table is to have, its weights `[V, D]`: of all
            parameters of the optimizer, in the order that it was given them.
        optimizer_state: `optimizer.state_dict()`.

    Returns:
        Arrays, steps and options by table name. A parameter that has made no step has
        slots of zeros. bfloat16 tensors become float32, which loses nothing.

    Raises:
        ValueError: another number of tables than the optimizer has parameters, slots
            of another shape or under other names, or an optimizer that maximizes.

    Examples:
        >>> ones = np.ones((3, 2), np.float32)
        >>> slots = {"step": 5, "exp_avg": ones, "exp_avg_sq": ones}
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}
        >>> state = {"state": {0: slots}, "param_groups": [group]}
        >>> found = from_torch({"user": ones}, state)
        >>> list(found.arrays["user"]), found.steps
        (['parameters', 'momenta', 'velocities'], {'user': 5})
        >>> print(found.options["user"]["epsilon"])
        1e-08

        Go on by `from_logical(init(features, Adam(**found.options["user"]), key),
        found.arrays)`.

    Source: `torch/optim/sparse_adam.py` and `sparse_adam` of
    `torch/optim/_functional.py`.
    """
    groups = optimizer_state["param_groups"]
    numbers = [(number, group) for group in groups for number in group["params"]]
    if len(numbers) != len(weights):
        raise ValueError(
            f"weights has the tables {list(weights)}, but optimizer_state has "
            f"{len(numbers)} parameters: pass a table for each, in their order"
        )
    found = TorchTables({}, {}, {})
    for (name, tensor), (number, group) in zip(weights.items(), numbers, strict=True):
        if group.get("maximize"):
            raise ValueError(
                f"optimizer_state maximizes table {name!r}, but updates here minimize: "
                "negate the loss, and set maximize=False in param_groups"
            )
        table = _to_numpy(tensor)
        state = optimizer_state["state"].get(number)
        if state is None:
            zeros = np.zeros_like(table)
            state = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros}
        missing = {"step", "exp_avg", "exp_avg_sq"} - set(state)
        if missing:
            raise ValueError(
                f"optimizer_state has {sorted(state)} of table {name!r}, and not "
                f"{sorted(missing)}: it must be that of torch.optim.SparseAdam"
            )
        arrays = {
            "parameters": table,
            "momenta": _to_numpy(state["exp_avg"]),
            "velocities": _to_numpy(state["exp_avg_sq"]),
        }
        _check_shapes(name, arrays)
        found.arrays[name] = arrays
        found.steps[name] = int(state["step"])
        found.options[name] = {
            "learning_rate": float(group["lr"]),
            "beta_1": float(group["betas"][0]),
            "beta_2": float(group["betas"][1]),
            "epsilon": float(group["eps"]),
            "sum_inside_sqrt": False,
        }
    return found


# How `tf.train.Checkpoint` ends the name of what a variable holds.
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# What TensorFlow's embedding for SparseCores saves beside its stacked tables.
_LAYOUTS = "_sparse_core_table_layouts"


def from_tensorflow(arrays: Mapping[str, Any], tables: Iterable[str]) -> Arrays:
    """Reads the variables of a TensorFlow `TPUEmbedding`, by their names.

    The variables of a table are called `user` and, its slots, `user/momenta` and so on,
    as here. `tf.compat.v1.train.Saver` writes these names; `tf.train.Checkpoint` and
    a `SavedModel` escape them, and put them behind the path of the embedding
    (`model/embedding/user.Smomenta/.ATTRIBUTES/VARIABLE_VALUE`). Both are known here.

    Args:
        arrays: by name in the checkpoint. Of `reader = tf.train.load_checkpoint(path)`
            pass `{name: reader.get_tensor(name) for name in
            reader.get_variable_to_shape_map()}`; what is not of these tables is left
            out.
        tables: the names of the tables to take, as a state's `state.tables`.
            TensorFlow calls table i of those without a name `table_i`, as is done here.

    Returns:
        By table name `parameters` and the slots, in the order of `tables`.

    Raises:
        ValueError: a table is not there, two variables have the names of one, or tables
            are stacked for SparseCores.

    Examples:
        >>> end = "/.ATTRIBUTES/VARIABLE_VALUE"
        >>> found = from_tensorflow({
        ...     "model/embedding/user" + end: np.ones((3, 2)),
        ...     "model/embedding/user.Smomenta" + end: np.zeros((3, 2)),
        ...     "save_counter" + end: np.array(7),
        ... }, ["user"])
        >>> {name: list(own) for name, own in found.items()}
        {'user': ['parameters', 'momenta']}

    Source: `_create_variables_and_slots` in `tensorflow/python/tpu/tpu_embedding_v2.py`
    and `escape_local_name` in `tensorflow/python/trackable/trackable_utils.py`; and
    what TensorFlow 2.21 writes.
    """
    found: Arrays = {name: {} for name in tables}
    for key, array in arrays.items():
        variable = _variable(key)
        if variable == _LAYOUTS:
            raise ValueError(
                f"arrays has {key!r}: its tables are stacked for SparseCores. Give the "
                "stacks to from_jax_tpu_embedding, as docs/checkpoints.md shows"
            )
        name, slot = _table_and_slot(variable, found)
        if not name:
            continue
        if slot in found[name]:
            raise ValueError(
                f"arrays has {slot!r} of table {name!r} twice, the second time as "
                f"{key!r}: pass the variables of one TPUEmbedding, which begin alike"
            )
        found[name][slot] = _to_numpy(array)
    lacking = [name for name, own in found.items() if "parameters" not in own]
    if lacking:
        raise ValueError(
            f"arrays has no weights of the tables {lacking}; its names are "
            f"{list(arrays)}"
        )
    return {
        name: {"parameters": own["parameters"], **own} for name, own in found.items()
    }


def _variable(key: str) -> str:
    """Returns the name of a variable, of its name in a checkpoint of either kind."""
    if not key.endswith(_VALUE):
        return key
    escaped = key.removesuffix(_VALUE).rpartition("/")[2]
    # TensorFlow has made `..` of `.` and `.S` of `/`.
    return re.sub(r"\.([.S])", lambda found: "./"[found[1] == "S"], escaped)


def _table_and_slot(variable: str, tables: Container[str]) -> tuple[str, str]:
    """Returns the table and the slot that a variable is of, or two empty names."""
    if variable in tables:
        return variable, "parameters"
    name, _, slot = variable.rpartition("/")
    return (name, slot) if name in tables else ("", "")


@dataclasses.dataclass(frozen=True)
class StackedTable:
    """Where jax-tpu-embedding keeps a table: what its `TableSpec` says.

    Args:
        name: of the table.
        vocabulary_size: V.
        embedding_dim: D.
        stack: the name of its stack, `stacked_table_spec.stack_name`; None is that of
            the table, which then stands alone.
        row_offset_in_shard: of its `setting_in_stack`.
        shard_rotation: of its `setting_in_stack`.
    """

    name: str
    vocabulary_size: int
    embedding_dim: int
    stack: str | None = None
    row_offset_in_shard: int = 0
    shard_rotation: int = 0


def from_jax_tpu_embedding(
    variables: Mapping[str, Any],
    tables: Iterable[StackedTable],
    num_shards: int,
    slot_names: Sequence[str] = ("momenta", "velocities"),
) -> Arrays:
    r"""Reads the stacked, MOD-sharded arrays of jax-tpu-embedding.

    With n shards, the SparseCores of all devices, an array of a stack is n parts, one
    behind the other. Row r of a table is in part

    .. math::

        (r \bmod n + \mathtt{shard\_rotation}) \bmod n

    at row :math:`\lfloor r / n \rfloor + \mathtt{row\_offset\_in\_shard}`, and columns
    beyond D fill up to a multiple of 8.

    Its Adam corrects by the step of all tables and has epsilon outside of the root,
    :math:`\epsilon \sqrt{1 - \beta_2^t}`, so to go on in the same way is
    `Adam(..., sum_inside_sqrt=False)`, with the rate
    `bias_corrected_learning_rate(rate, t)`. Only epsilon differs then, by a factor that
    is 0.8 at step 1000 and nears 1. Some of its layers never pass the step: they have
    trained with :math:`t = 1` at each.

    Args:
        variables: by stack name `EmbeddingVariables(table, slot)`, or a tuple or dict
            of the two: an array `[rows, columns]`, and a tuple of arrays alike.
        tables: where each table is.
        num_shards: n, `global_device_count * num_sc_per_device`.
        slot_names: what the arrays of `slot` are called here, in their order; of Adam
            by default, `("accumulators",)` of Adagrad.

    Returns:
        By table name `parameters` and the slots, `[V, D]` each.

    Raises:
        ValueError: a stack is not there, has another number of slots, does not divide
            into n parts, or is too small for a table.

    Examples:
        >>> part = np.zeros((8, 8), np.float32)
        >>> part[0, :2], other = [1, 2], part + 5  # rows 0, 2 and 1, 3 of the table
        >>> stack = {"user": (np.concatenate([part, other]), ())}
        >>> table = StackedTable("user", vocabulary_size=3, embedding_dim=2)
        >>> from_jax_tpu_embedding(stack, [table], 2, ())["user"]["parameters"].tolist()
        [[1.0, 2.0], [5.0, 5.0], [0.0, 0.0]]

    Source: `stack_and_shard_tables` and `compute_physical_row_ids` in
    `jax_tpu_embedding/sparsecore/lib/nn/table_stacking.py`.
    """
    found: Arrays = {}
    for table in tables:
        stack = table.stack or table.name
        if stack not in variables:
            raise ValueError(
                f"variables has no stack {stack!r} of table {table.name!r}, but "
                f"{list(variables)}"
            )
        weights, slots = _table_and_slots(variables[stack])
        if len(slots) != len(slot_names):
            raise ValueError(
                f"the stack {stack!r} has {len(slots)} slots, but {slot_names=}: name "
                "each of them, in their order"
            )
        names = ("parameters", *slot_names)
        found[table.name] = {
            name: _unstacked(_to_numpy(array), table, num_shards)
            for name, array in zip(names, (weights, *slots), strict=True)
        }
    return found


def _table_and_slots(variables: Any) -> tuple[Any, Sequence[Any]]:
    if isinstance(variables, Mapping):
        variables = variables["table"], variables["slot"]
    table, slots = variables
    return table, slots if isinstance(slots, tuple | list) else (slots,)


def _unstacked(array: np.ndarray, table: StackedTable, num_shards: int) -> np.ndarray:
    """Returns the rows and columns of a table out of an array of its stack."""
    if num_shards < 1 or len(array) % num_shards:
        raise ValueError(
            f"the stack of table {table.name!r} has {len(array)} rows, which do not "
            f"divide by {num_shards=}: pass global_device_count * num_sc_per_device"
        )
    parts = array.reshape(num_shards, -1, *array.shape[1:])
    rows = np.arange(table.vocabulary_size)
    part = (rows + table.shard_rotation) % num_shards
    place = rows // num_shards + table.row_offset_in_shard
    if place[-1] >= parts.shape[1] or table.embedding_dim > array.shape[1]:
        raise ValueError(
            f"the stack of table {table.name!r} has {num_shards} parts of the shape "
            f"{parts.shape[1:]}, too small for {table}: is num_shards right?"
        )
    return parts[part, place, : table.embedding_dim]


def _check_shapes(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    shapes = {slot: array.shape for slot, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the arrays of table {name!r} have different {shapes=}")


def _to_numpy(tensor: Any) -> np.ndarray:
    """Returns a tensor of torch, TensorFlow or JAX as an array."""
    if hasattr(tensor, "detach"):  # of torch
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # which NumPy does not know
            tensor = tensor.float()
        return tensor.numpy()
    return np.asarray(tensor)
