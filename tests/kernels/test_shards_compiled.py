"""Tables spread over the four chips of a slice, as libtpu compiles their update."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.routing import collectives
from sparse_adam import (
    AdamState,
    PackedTable,
    UpdatePlan,
    packed_adam_update,
    sparse_adam_update,
)
from sparse_adam.ops.routing import default_quota
from tests import programs
from tests.kernels.topology import AXIS, four_chips

V, N = 4_000_000, 4096
ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
MOVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize(
    ("slice_", "kernel", "kind"),
    [
        ("v5e:2x2", "tensorcore", AxisType.Explicit),
        ("v5e:2x2", "tensorcore", AxisType.Auto),
        ("v6e:2x2", "sparsecore", AxisType.Explicit),
        ("v6e:2x2", "sparsecore", AxisType.Auto),
        ("v6e:2x2", "sweep", AxisType.Explicit),
    ],
)
def test_every_chip_updates_its_rows_in_place(
    slice_, kernel, storage, kind, monkeypatch
):
    mesh = four_chips(monkeypatch, slice_, kind)
    dim = 128 if storage == "plain" else 64

    def placed(shape, dtype=jnp.int32, spec=WHOLE) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def update(state: AdamState | PackedTable, ids, grads, sorted_ids, order):
        # The sort takes libtpu a minute.
        plan = UpdatePlan(sorted_ids, order, V)
        options: Any = {"plan": plan, "implementation": kernel}
        if kind == AxisType.Auto:
            options["sharding"] = NamedSharding(mesh, ROWS)
        if isinstance(state, PackedTable):
            return packed_adam_update(state, ids, grads, **options)
        return sparse_adam_update(*state, ids, grads, **options)

    table = placed((V, dim), jnp.float32, ROWS)
    state = AdamState(table, table, table)
    if storage == "packed":
        packed = jax.eval_shape(
            PackedTable.pack, *(jax.ShapeDtypeStruct((V, dim), jnp.float32),) * 3
        )
        state = PackedTable(placed(packed.lines.shape, spec=ROWS), packed.layout)
    batch = placed((N,), spec=ROWS), placed((N, dim), jnp.float32, ROWS)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(update, donate_argnums=0)
            .lower(state, *batch, placed((N,)), placed((N,)))
            .compile()
        )
    memory, text = programs.memory(compiled), programs.text(compiled)
    own = 3 * 4 * V * dim // 4
    assert own <= memory.alias_size_in_bytes < 1.01 * own
    assert memory.temp_size_in_bytes < own // 50
    assert f"sparse_adam_{kernel}" in text
    # Gradients, and with them perhaps the ids, which the plan has already.
    sent = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{MOVES})", text)
    assert f"{N},{dim}" in sent and set(sent) <= {f"{N},{dim}", f"{N}"}


def test_a_lookup_sends_rows_only(monkeypatch):
    mesh = four_chips(monkeypatch, "v5e:2x2", AxisType.Explicit)
    packed = jax.eval_shape(
        PackedTable.pack, *(jax.ShapeDtypeStruct((V, 64), jnp.float32),) * 3
    )
    lines, ids = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
        for shape, spec in ((packed.lines.shape, ROWS), ((N,), WHOLE))
    )
    lookup = jax.jit(lambda lines, ids: PackedTable(lines, packed.layout).lookup(ids))
    text = programs.text(lookup.lower(lines, ids).compile())
    assert "sparse_adam_lookup" in text
    sent = re.findall(rf"= \w+\[([\d,]*)\]\S* (?:{MOVES})", text)
    assert sent and all(size.split(",")[0] in (f"{N}", f"{N // 4}") for size in sent)


@pytest.mark.parametrize(
    ("slice_", "kernel", "looked_up"),
    [("v5e:2x2", "tensorcore", "lookup"), ("v6e:2x2", "sparsecore", "combine")],
)
def test_a_routed_step_is_in_place_and_sends_what_others_ask_for(
    slice_, kernel, looked_up, monkeypatch
):
    """A kernel in the loop of rounds aliases its table; no array has all N ids."""
    mesh, num_ids = four_chips(monkeypatch, slice_, AxisType.Explicit), 512

    def placed(shape, dtype=jnp.int32) -> Any:
        place = NamedSharding(mesh, ROWS)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(table: PackedTable, ids, factors):
        grads = table.lookup(ids) * factors
        return packed_adam_update(table, ids, grads, implementation=kernel)

    packed = jax.eval_shape(
        PackedTable.pack, *(jax.ShapeDtypeStruct((V, 64), jnp.float32),) * 3
    )
    table = PackedTable(placed(packed.lines.shape), packed.layout)
    arguments = placed((num_ids,)), placed((num_ids, 1), jnp.float32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(table, *arguments)
        compiled = lowered.compile()
    memory, text = programs.memory(compiled), programs.text(compiled)
    own = 3 * 4 * V * 64 // 4
    assert own <= memory.alias_size_in_bytes < 1.01 * own
    assert memory.temp_size_in_bytes < own // 50
    assert f"sparse_adam_{kernel}" in text and f"sparse_adam_{looked_up}" in text
    sent = list(collectives(text))
    names = {"ragged-all-to-all", "all-to-all", "all-reduce"}
    assert {each.name for each in sent} == names
    quota = default_quota(num_ids // 4, 4)
    # Two rows share a line, and the slice of each chip begins with one.
    lines = {num_ids // 4 // 2 + 4, quota.total // 2 + 4}
    rows = [each for each in sent if each.name == "ragged-all-to-all"]
    assert {each.shape[0] for each in rows} == lines


def test_automatic_axes_need_to_be_told(monkeypatch):
    """The compiler does not ask how to cut an operation: nothing is gathered."""
    mesh = four_chips(monkeypatch, "v5e:2x2", AxisType.Auto)
    table, ids, grads = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((V, 128), jnp.float32, ROWS),
            ((N,), jnp.int32, WHOLE),
            ((N, 128), jnp.float32, WHOLE),
        )
    )
    words = "on 4 TPUs over automatic axes.* pass sharding=table.sharding"
    with pytest.raises(ValueError, match=words):
        jax.jit(sparse_adam_update).lower(table, table, table, ids, grads)
