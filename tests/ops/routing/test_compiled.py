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
    return lambda topology, chips, dim=D: compile_step(topology, chips, N, dim)


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
    few, many = (program.received_bytes for program in programs)
    assert few < many < 1.1 * few
    assert programs[1].temporary_bytes < 1.5 * programs[0].temporary_bytes


def test_narrow_rows_share_lines(compiled):
    """And other chips have the same exchanges."""
    program = compiled("v5p:2x2x1", 4, dim=32)
    quota = default_quota(N, 4)
    sent = [each for each in program.collectives if each.name == "ragged-all-to-all"]
    lines = [(each.shape, each.bytes) for each in sent]
    assert sorted(lines) == [
        ((count, 1, 128), 512 * count) for count in (N // 4 + 4, quota.total // 4 + 4)
    ]
    assert "all-gather" not in {each.name for each in program.collectives}
