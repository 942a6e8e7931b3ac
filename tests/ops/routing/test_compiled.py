"""A routed step as libtpu compiles it for slices of TPUs."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.routing import Program, compiled, slice_mesh
from benchmarks.static.compiler import WITHOUT_TPU
from sparse_adam.ops import routing
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.rounds import default_quota

N, D = 512, 128


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in WITHOUT_TPU.items():
        monkeypatch.setenv(variable, os.environ.get(variable, value))


def compile_step(topology: str, chips: int, dim: int = D) -> Program:
    """A route, a lookup and an update, with gathers and scatters of XLA."""
    mesh, spec = slice_mesh(topology, chips), PartitionSpec("chip")
    placement = Placement(1000 * chips, chips, interleaved=True)

    def update(table: jax.Array, rows: jax.Array, grads: jax.Array) -> jax.Array:
        outside = jnp.where(rows < 0, placement.rows_per_shard, rows)
        return table.at[outside].add(grads, mode="drop")

    def step(
        table: jax.Array, ids: jax.Array, grads: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        route = routing.route(ids, placement, "chip")
        found = routing.lookup(route, lambda rows: table.at[rows].get(mode="clip"))
        return routing.update(route, grads * found, table, update), found

    def placed(rows: int, *shape: int, dtype: Any = jnp.float32) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    lowered = jax.jit(mapped, donate_argnums=0).lower(
        placed(placement.end, dim),
        placed(chips * N, dtype=jnp.int32),
        placed(chips * N, dim),
    )
    return compiled(lowered, topology, chips)


def test_what_chips_receive_does_not_grow_with_their_number():
    """Rows there, gradients back, and ids in lines: all else is counts."""
    programs = [compile_step("v6e:2x2", 4), compile_step("v6e:4x4", 16)]
    for program in programs:
        quota = default_quota(N, program.chips)
        first = [each for each in program.collectives if not each.further]
        sizes = sorted((each.name, each.shape) for each in first)
        assert sizes == [
            ("all-reduce", (program.chips,)),
            ("all-to-all", (program.chips, 1, 1)),
            ("all-to-all", (program.chips, 1, quota.part + 2)),
            ("ragged-all-to-all", (N, 1, D)),
            ("ragged-all-to-all", (quota.total, 1, D)),
        ]
        rows = [each for each in first if each.name == "ragged-all-to-all"]
        assert sum(each.bytes for each in rows) == 4 * D * (N + quota.total)
        # Further rounds exchange ids by themselves, and rows by the same program.
        assert {each.name for each in program.collectives if each.further} == {
            "all-reduce",
            "all-to-all",
        }
    few, many = (program.received_bytes for program in programs)
    assert few < many < 1.1 * few
    assert programs[1].temporary_bytes < 1.5 * programs[0].temporary_bytes


def test_narrow_rows_share_lines():
    """And other chips have the same exchanges."""
    program = compile_step("v5p:2x2x1", 4, dim=32)
    quota = default_quota(N, 4)
    sent = [each for each in program.collectives if each.name == "ragged-all-to-all"]
    lines = [(each.shape, each.bytes) for each in sent]
    assert sorted(lines) == [
        ((count, 1, 128), 512 * count) for count in (N // 4 + 4, quota.total // 4 + 4)
    ]
    assert "all-gather" not in {each.name for each in program.collectives}
