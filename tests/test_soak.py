"""The soak kills, harms and fills, finds nothing wrong, and sees what would be."""

from types import SimpleNamespace
from typing import Any

from tests.soak import __main__ as command

SEED = 4  # draws more than three checkpoints of the first life


def test_nothing_is_lost_and_what_is_wrong_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PAUSE", 0.05)
    soak = command.Soak(tmp_path, tmp_path / "checkpoints", 1200, SEED)
    assert sorted(soak.reference) == list(range(100, 1300, 100))
    for end in ("corrupt", "full disk"):
        soak.live(end)
    assert not soak.faults
    harms = ("truncated", "deleted", "a bit turned")
    assert sum(soak.counts[harm] for harm in harms) == 1
    assert soak.counts["corrupt: killed"] == soak.counts["full disk: raised"] == 1
    assert soak.counts["checkpoints compared"] >= 3

    def faults(status: int | None, end: str, may_begin_at: list[int]) -> str:
        soak.faults.clear()
        life: Any = SimpleNamespace(first=300, made=1000, output="an error")
        soak.check(life, status, end, may_begin_at)
        return "\n".join(soak.faults)

    last = command.saved_steps(soak.folder)[0]
    soak.reference[last] = "others"
    found = faults(None, "kill", [200])
    assert "began at 300, not one of [200]" in found
    assert f"made 1300 steps, and the last saved is {last}" in found
    assert f"other bits at step {last}" in found
    assert "ended with status 1: an error" in faults(1, "kill", [300])
    assert "did not say that the disk is full" in faults(1, "full disk", [300])
    assert f"ended well, with checkpoints [{last}" in faults(0, "no memory", [300])
