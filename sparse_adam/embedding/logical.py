"""Computing with a whole state: by its weights and slots, however they are stored.

Of plain tables `jax.tree.map` does the same. The leaves of packed ones are words that
hold several arrays, so that sums or casts of them mean nothing.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_adam.embedding.functional import EmbeddingState
from sparse_adam.embedding.stored import arrays, checked, with_arrays
from sparse_adam.ops.packed import PackedTable


def logical_arrays(state: EmbeddingState) -> dict[str, dict[str, jax.Array]]:
    """Returns the weights and slots of each table: a pytree to compute with.

    Args:
        state: of plain or packed tables.

    Returns:
        By table name `parameters` and, for `Adam`, `momenta` and `velocities`: `[V, D]`
        each. Those of plain tables are the state's own arrays.

    Raises:
        TypeError: the state has arrays of a wrong dtype.
        ValueError: the state is not of its layout's shape.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> table = TableConfig(4, 4, jax.nn.initializers.ones, name="user")
        >>> state = init(FeatureConfig(table), Adam(), jax.random.key(0))
        >>> norms = jax.tree.map(jnp.linalg.norm, logical_arrays(state))
        >>> {name: float(x) for name, x in norms["user"].items()}
        {'momenta': 0.0, 'parameters': 4.0, 'velocities': 0.0}
    """
    return {
        table.name: dict(
            zip(table.array_names, arrays(checked(state.tables, table)), strict=True)
        )
        for table in state.layout.tables
    }


def map_arrays(
    function: Callable[..., ArrayLike], state: EmbeddingState, *others: EmbeddingState
) -> EmbeddingState:
    """Applies a function to the weights and to each slot of all tables.

    Args:
        function: of an array `[V, D]` (or `[V]` of a slot per row) and the same one of
            each of `others`, to one of this shape, float32 or bfloat16.
        state: of plain or packed tables.
        *others: states of the same layout, stored alike or not.

    Returns:
        A state that is stored as `state` is.

    Raises:
        TypeError: a result is of another dtype.
        ValueError: a state is of another layout, or a result of another shape.

    Example:
        >>> import jax
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = FeatureConfig(TableConfig(4, 2, name="user"))
        >>> a, b = (init(config, Adam(), jax.random.key(i)) for i in (0, 1))
        >>> average = map_arrays(lambda x, y: (x + y) / 2, a, b)
        >>> average.tables["user"].table.shape
        (4, 2)
    """
    for number, other in enumerate(others):
        if other.layout != state.layout:
            raise ValueError(
                f"others[{number}].layout={other.layout} must be that of the state, "
                f"{state.layout}: make both from one feature_config and optimizer"
            )
    tables = {}
    for table in state.layout.tables:
        stored = [checked(one.tables, table) for one in (state, *others)]
        new = [function(*own) for own in zip(*map(arrays, stored), strict=True)]
        if isinstance(stored[0], PackedTable):
            tables[table.name] = PackedTable.pack(*new)
        else:
            tables[table.name] = table.optimizer.state_of(new)  # type: ignore[arg-type]
        checked(tables, table)
    return EmbeddingState(tables, state.layout)


def loaded(
    state: EmbeddingState, tables: Mapping[str, Mapping[str, ArrayLike]]
) -> EmbeddingState:
    """Returns a state with copies of some arrays, for `TPUEmbedding.load`."""
    if not isinstance(tables, Mapping):
        raise TypeError(
            f"load() got {type(tables).__name__}; it must be a dict of tables by "
            "name, as retrieve() returns"
        )
    new = dict(state.tables)
    known = {table.name: table for table in state.layout.tables}
    for name, given in tables.items():
        if name not in known:
            raise ValueError(f"load() got the table {name!r}, not in {list(known)}")
        names = known[name].array_names
        if not isinstance(given, Mapping):
            raise TypeError(
                f"load() got {type(given).__name__} for table {name!r}; it must be "
                f"a dict of some of the arrays {names}: for the weights alone pass "
                f"{{{name!r}: {{'parameters': array}}}}"
            )
        parts = dict(zip(names, arrays(new[name]), strict=True))
        for slot, array in given.items():
            if slot not in parts or np.shape(array) != parts[slot].shape:
                expected = {key: value.shape for key, value in parts.items()}
                raise ValueError(
                    f"load() got {slot!r} of shape {np.shape(array)} for table "
                    f"{name!r}; it must be one of {expected}"
                )
            # A copy: the next update donates it.
            parts[slot] = jnp.array(array, dtype=parts[slot].dtype, copy=True)
        new[name] = with_arrays(new[name], list(parts.values()))
    return EmbeddingState(new, state.layout)
