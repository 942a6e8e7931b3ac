"""What `jax.export` writes of the types that exported functions take and return.

A function of these types is exported and called by programs that have this package. One
that is called without it takes plain arrays: see docs/serving.md.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import export

from sparse_adam.embedding import adam_states, by_row, frozen, optimizers, stats
from sparse_adam.embedding.inputs import Ragged, Sparse
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.ops.nearest import Nearest
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.sparse_adam import AdamState

_NAMED_TUPLES = (
    AdamState,
    Nearest,
    adam_states.AdamRowState,
    adam_states.AMSGradState,
    adam_states.AMSGradRowState,
    by_row.RowGradients,
    frozen.FrozenState,
    optimizers.SGDState,
    optimizers.AdagradState,
    optimizers.AdagradMomentumState,
    optimizers.FTRLState,
    optimizers.RowWiseAdagradState,
    stats.BatchStats,
)


def _packed_to_json(static: Any) -> Any:
    (layout,) = static
    return layout.num_rows, layout.dim, [dtype.name for dtype in layout.dtypes]


def _packed_from_json(found: Any) -> tuple[PackedLayout]:
    num_rows, dim, dtypes = found
    return (PackedLayout(num_rows, dim, tuple(map(np.dtype, dtypes))),)


def _sparse_from_json(found: Any) -> tuple[tuple[int, ...]]:
    return (tuple(found[0]),)


def _refuse(static: Any) -> Any:
    del static
    raise ValueError(
        "an EmbeddingState can not be written into an exported function: its layout "
        "holds initializers and optimizers, which are Python's. Export a function of "
        "its arrays: arrays, structure = jax.tree.flatten(state), and in the function "
        "state = jax.tree.unflatten(structure, arrays) (docs/serving.md)"
    )


def _register(
    kind: type, write: Callable[[Any], Any], read: Callable[..., Any]
) -> None:
    """Registers a dataclass, by what to write of its static fields, as JSON."""
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"sparse_adam.{kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(write(static)).encode(),
        deserialize_auxdata=lambda text: read(json.loads(text)),
    )


for _kind in _NAMED_TUPLES:
    export.register_namedtuple_serialization(
        _kind, serialized_name=f"sparse_adam.{_kind.__name__}"
    )
_register(PackedTable, _packed_to_json, _packed_from_json)
_register(UpdatePlan, tuple, tuple)
_register(Ragged, tuple, tuple)
_register(Sparse, tuple, _sparse_from_json)
_register(EmbeddingState, _refuse, _refuse)
