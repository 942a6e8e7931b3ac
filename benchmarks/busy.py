"""Tells how busy other programs keep the machine, since that spoils what is timed."""

import os
import time
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")  # Linux only
IDLE = (3, 4)  # the columns of a line of it that count idle time, and waits for a disk
LONG_ENOUGH = 0.3  # seconds, to count ticks of 10 ms
SHARE = 0.1  # of the cores: what others may take without a warning


class Clock(NamedTuple):
    """The time of day, and what all programs and this one have run until then."""

    wall: float
    everybody: float  # seconds of all cores
    own: float


def read_clock() -> Clock | None:
    """Reads the clocks; None where the system does not tell."""
    try:
        fields = STAT.read_text().partition("\n")[0].split()[1:9]
        ticks = [int(field) for field in fields]
        busy = sum(ticks) - sum(ticks[at] for at in IDLE)
        everybody = busy / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    own = os.times()
    ran = own.user + own.system + own.children_user + own.children_system
    return Clock(time.monotonic(), everybody, ran)


def cores_of_others(before: Clock | None, after: Clock | None) -> float | None:
    """Returns how many cores other programs took between two readings, on average."""
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.everybody - before.everybody) - (after.own - before.own)
    return max(0.0, round(others / (after.wall - before.wall), 2))


def sample() -> float | None:
    """Returns how many cores other programs take now; None where nobody tells."""
    before = read_clock()
    time.sleep(LONG_ENOUGH)
    return cores_of_others(before, read_clock())


def warning(taken: float | None, when: str) -> str | None:
    """Says that the machine was loaded, if it was so loaded that times are spoilt."""
    cores = os.cpu_count() or 1
    if taken is None or taken <= max(0.25, SHARE * cores):
        return None
    return (
        f"Warning: {when} other programs took {taken:.1f} of {cores} cores. "
        "Times depend on it; repeat the run on a quiet machine."
    )
