"""Predictions follow from published bandwidths and counted bytes."""

import json

import pytest

from benchmarks.results import COMMITTED
from benchmarks.routed_batches import message_bytes
from benchmarks.weak_scaling import NETWORKS, STEPS, predictions, weak_scaling_figure
from sparse_adam.ops.routing.rounds import default_quota

D, N, U = 128, 4096, 4000
networks = {network.chip: network for network in NETWORKS}


@pytest.mark.parametrize(
    ("chip", "published"), [("v5e", 1600), ("v6e", 3200)], ids=["v5e", "v6e"]
)
def test_the_bisection_of_a_pod_is_the_published_one(chip, published):
    assert networks[chip].bisection((16, 16)) == published


def test_a_mesh_has_half_the_links_of_a_torus():
    v6e, v5p = networks["v6e"], networks["v5p"]
    assert v6e.bisection((8, 8)) == 8 * 100
    assert v5p.bisection((4, 4, 4)) == 2 * 16 * 100
    assert v5p.bisection((2, 2, 4)) == 4 * 100
    # 300 bytes to each of 4 chips, of which 75 are its own: 225 by two links.
    assert v6e.ns_into_a_chip((2, 2), 300) == 225 / 200
    # Each half sends the other one 300 bytes.
    assert v6e.ns_through_the_middle((2, 2), 300) == 300 / 200
    assert v5p.ns_into_a_chip((4, 4, 4), 640) == 630 / 600
    assert v5p.ns_through_the_middle((4, 4, 4), 640) == 64 * 640 / 4 / 3200


@pytest.fixture
def path(tmp_path):
    """A file of `routing` beside the committed one of `step --static`."""
    record = {"kind": "traffic", "distribution": "uniform", "ids": N, "unique": U}
    found = {"schema": 1, "config": {"dim": D}, "records": [record]}
    (tmp_path / "routing.json").write_text(json.dumps(found))
    (tmp_path / STEPS).write_text((COMMITTED / STEPS).read_text())
    return tmp_path / "routing.json"


def test_predictions_are_of_the_bytes_of_an_id(path):
    found = {(each.chip, each.chips): each for each in predictions(path)}
    assert len(found) == 4 * len(NETWORKS)
    for (chip, chips), each in found.items():
        devices = chips * networks[chip].devices
        messages = message_bytes(default_quota(N, devices), devices)
        assert each.received == (2 * 4 * D * U + messages) / N
        # Both devices of a chip of 7x share its links.
        of_chip = networks[chip].devices * each.received
        middle = chips * of_chip / 4 / networks[chip].bisection(each.shape)
        assert each.middle == pytest.approx(middle)
        assert each.network >= each.middle
        assert each.one_after_another == each.network + max(each.hbm, each.issue)


def test_without_compiled_steps_there_is_no_figure(path):
    assert weak_scaling_figure(path) is not None
    path.with_name(STEPS).unlink()
    assert weak_scaling_figure(path) is None
