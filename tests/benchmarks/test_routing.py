"""What chips would send each other: the simulation against the routing itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import AxisType, PartitionSpec

from benchmarks.__main__ import main
from benchmarks.routed_batches import ids, table_rows, traffic
from benchmarks.routing import collectives
from sparse_adam.ops import routing
from sparse_adam.ops.combine import Samples
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.routing.rounds import Quota, default_quota
from sparse_adam.ops.spread import Spread
from sparse_adam.ops.spread_samples import route_batch

D = 128


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_bytes_each_way_are_those_of_the_distinct_ids(distribution):
    """For the fullest chip of up to 64, within a tenth; and in one round."""
    for chips in (4, 16, 64):
        placement = Placement(100_000_000, chips, interleaved=True)
        found = traffic(distribution, 4096, placement, default_quota(4096, chips))
        assert found.rounds == 1
        assert found.received == pytest.approx(found.unique)
        limit = 1.1 * found.unique * (4 * D + 4)
        assert found.most_received * (4 * D + 4) <= limit


@pytest.mark.parametrize(
    ("distribution", "quota"),
    [("uniform", None), ("zipf", Quota(64, 40)), ("one owner", Quota(200, 9))],
)
def test_the_simulation_counts_what_is_sent(distribution, quota):
    placement, size = Placement(1000, 8, interleaved=distribution != "zipf"), 128
    quota = quota or default_quota(size, 8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")

    def count(ids):
        def update(counts, rows, grads):
            return counts + jnp.stack([jnp.sum(rows >= 0), 1]).astype(jnp.int32)[None]

        route = routing.route(ids, placement, "x", quota=quota)
        nothing = jnp.zeros((ids.size, 1))
        start = jnp.zeros((1, 2), jnp.int32)
        named = jnp.sum(route.unique.places < placement.end)[None]
        return routing.update(route, nothing, start, update), named

    batch = np.concatenate(
        [
            ids(distribution, size, placement, np.random.default_rng((0, chip)))
            for chip in range(8)
        ]
    ).astype(np.int32)
    mapped = jax.shard_map(count, mesh=mesh, in_specs=spec, out_specs=spec)
    counts, named = jax.jit(mapped)(batch)
    found = traffic(distribution, size, placement, quota)
    assert found.unique == np.mean(named)
    assert found.received == np.mean(counts[:, 0])
    assert found.most_received == np.max(counts[:, 0])
    assert set(np.asarray(counts[:, 1]).tolist()) == {found.rounds}
    assert (found.rounds == 1) == (distribution == "uniform")


@pytest.mark.parametrize("distribution", ["uniform", "zipf"])
def test_the_embedding_api_gives_the_exchange_these_counts(distribution):
    """The route of samples of four ids, as the ragged exchange gets it."""
    placement, size = Placement(1000, 8, interleaved=True), 128
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    batch = np.concatenate(
        [
            ids(distribution, size, placement, np.random.default_rng((0, chip)))
            for chip in range(8)
        ]
    ).astype(np.int32)
    samples = Samples(jnp.asarray(batch), None, None, None)
    how = {"spread": Spread(mesh, ("x",)), "num_rows": 1000, "sizes": (8 * size // 4,)}
    window = route_batch([samples], **how).rows.first.window
    found = traffic(distribution, size, placement, default_quota(size, 8))
    assert found.rounds == 1
    asked, named = (x.reshape(8, 8).sum(1) for x in (window.sent, window.received))
    assert found.unique == np.mean(asked)
    assert found.received == np.mean(named)
    assert found.most_received == np.max(named)


def test_samples_of_dlrm_repeat_small_tables():
    placement = Placement(table_rows("dlrm", 16), 16, interleaved=True)
    drawn = ids("dlrm", 2140, placement, np.random.default_rng(0))
    assert drawn.size == 10 * 214
    assert np.all((drawn >= 0) & (drawn < placement.num_rows))
    assert 1200 < np.unique(drawn).size < 2140


def test_collectives_are_read_with_the_padding_of_their_layouts():
    text = """
  %a = s32[4,1,5]{2,1,0:T(1,128)S(1)} all-to-all(%x), channel_id=1
  %b = (f32[9,64]{1,0:T(8,128)}, f32[9,64]{1,0:T(8,128)}) all-gather-start(%y)
  %c = bf16[6]{0} all-reduce(%z), metadata={op_name="jit(f)/further_round/psum"}
  %d = f32[6]{0} add(%all-reduce.1, %z)
"""
    found = [(c.name, c.shape, c.bytes, c.further) for c in collectives(text)]
    assert found == [
        ("all-to-all", (4, 1, 5), 4 * 128 * 4, False),
        ("all-gather", (9, 64), 16 * 128 * 4, False),
        ("all-reduce", (6,), 12, True),
    ]


def test_the_command_writes_what_it_counts(tmp_path):
    out = tmp_path / "routing.json"
    sizes = ["--ids", "512", "--samples", "3", "--chips", "4"]
    arguments = ["--no-compile", *sizes, "--out", str(out)]
    done = CliRunner().invoke(main, ["routing", *arguments])
    assert done.exit_code == 0, done.output
    records = json.loads(out.read_text())["records"]
    assert {record["distribution"] for record in records} == {
        *("uniform", "zipf", "dlrm", "one owner")
    }
    for record in records:
        assert record["ids"] == (642 if record["distribution"] == "dlrm" else 512)
        assert record["received"] <= record["ids"] and record["rounds"] >= 1
    assert "what the ragged exchange is given" in done.output
