"""A step of samples of several ids as libtpu compiles it for slices of TPUs."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.routing import ENVIRONMENT, Collective, collectives
from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.options import UpdateOptions
from sparse_adam.ops.routing import default_quota
from sparse_adam.ops.spread import Spread
from sparse_adam.ops.spread_samples import lookup_batch, update_batch
from sparse_adam.rules import AdagradRule

D, PLACES, S = 128, 8, 64  # S samples on each chip
N = S * PLACES


def compiled(topology: str, chips: int) -> tuple[list[Collective], Any]:
    """The collectives of one round of a lookup and an update, and the memory."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
    spread = Spread(Mesh(np.array(devices), ("chip",)), ("chip",))
    layout = PlainLayout(1000 * chips, D, (np.dtype(np.float32),) * 2, (False,) * 2)
    how: Any = {"spread": spread, "layout": layout, "sizes": (S * chips,)}

    def step(state: Any, ids: Any, scales: Any, grads: Any) -> Any:
        batch = [Samples(ids, None, None, scales)]
        (found,) = lookup_batch(state[0], batch, **how)
        grads = [grads * found]
        return update_batch(state, batch, grads, AdagradRule(), UpdateOptions(), **how)

    def placed(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=spread.sharding)

    table = placed(spread.whole(layout).num_rows, D)
    program = (
        jax.jit(step, donate_argnums=0)
        .lower(
            (table, table),
            placed(N * chips, dtype=jnp.int32),
            placed(S * chips),
            placed(S * chips, D),
        )
        .compile()
    )
    found = collectives(program.as_text() or "")
    return [each for each in found if not each.further], program.memory_analysis()


def test_what_chips_receive_does_not_grow_with_their_number(monkeypatch):
    """Rows there, gradients back: one of each for an id at most, none for a sample."""
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, os.environ.get(variable, value))
    received = []
    for topology, chips in (("v6e:2x2", 4), ("v6e:4x4", 16)):
        sent, memory = compiled(topology, chips)
        assert {each.name for each in sent} == {
            "all-reduce",
            "all-to-all",
            "ragged-all-to-all",
        }
        rows = [each.shape for each in sent if each.name == "ragged-all-to-all"]
        assert sorted(rows) == [(N, 1, D), (default_quota(N, chips).total, 1, D)]
        assert memory.alias_size_in_bytes == 2 * 1000 * D * 4  # in place
        received.append(sum(each.bytes for each in sent))
    assert received[0] < received[1] < 1.1 * received[0], received
