"""A routed step as libtpu compiles it for slices of TPUs."""

import os

import pytest

from benchmarks.routing import ENVIRONMENT, compile_step
from sparse_adam.ops.routing.rounds import default_quota

N, D = 512, 128


@pytest.fixture
def compiled(monkeypatch):
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, os.environ.get(variable, value))
    return lambda topology, chips: compile_step(topology, chips, N, D)


def test_what_chips_receive_does_not_grow_with_their_number(compiled):
    """Rows there, gradients back, and ids in lines: all else is counts."""
    programs = [compiled("v6e:2x2", 4), compiled("v6e:4x4", 16)]
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
        # Sums of gradients, rows, and buffers for both.
        assert program.temporary_bytes < 5 * 4 * D * quota.total
    few, many = (program.received_bytes for program in programs)
    assert few < many < 1.1 * few


def test_on_other_chips(compiled):
    program = compiled("v5p:2x2x1", 4)
    names = [each.name for each in program.collectives if each.shape[-1] == D]
    assert names.count("ragged-all-to-all") == 2 and "all-gather" not in names
