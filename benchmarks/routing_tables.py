"""Tables of what `python -m benchmarks routing` compiled and counted."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.routed_batches import message_bytes
from benchmarks.static.tables import Table
from sparse_adam.ops.routing.rounds import Quota

ROWS = "ragged-all-to-all"  # by which rows and gradients travel
Record = dict[str, Any]


def programs_table(found: Record) -> Table:
    """One line for each compiled step: its collectives, and what they receive."""
    header = ["ids", "slice", "devices", "all-gathers", "ragged", "other collectives"]
    header += ["rows and gradients, MB", "the rest, MB", "temporaries, MB"]
    header.append("compiled in, s")
    lines = []
    for record in _records(found, "program"):
        first = [each for each in record["collectives"] if not each["further"]]
        counts = Counter(each["name"] for each in first)
        every = Counter(each["name"] for each in record["collectives"])
        rows = sum(each["bytes"] for each in first if each["name"] == ROWS)
        rest = sum(each["bytes"] for each in first) - rows
        others = sum(counts.values()) - counts[ROWS] - counts["all-gather"]
        lines.append(
            [
                record["form"],
                record["topology"].replace(":", " "),
                f"{record['chips']}",
                f"{every['all-gather']}",
                f"{counts[ROWS]}",
                f"{others}",
                *(f"{n / 1e6:.3f}" for n in (rows, rest)),
                f"{record['temporary_bytes'] / 1e6:.2f}",
                f"{record['seconds']:.0f}",
            ]
        )
    return header, lines


def traffic_table(found: Record) -> Table:
    """One line for each batch: what the ragged exchange is given, and how often.

    U is the mean number of distinct ids of a device, M what others name to it.
    """
    header = ["ids", "placement", "devices", "ids of each", "U"]
    header += ["lookup / limit", "update / limit", "of the fullest", "rounds"]
    header += ["received, MB", "over the fewest devices"]
    first: dict[tuple[str, bool], float] = {}
    lines = []
    for record in _records(found, "traffic"):
        unique, dim = record["unique"], found["config"]["dim"]
        limit = unique * (4 * dim + 4)
        bytes_received = received_bytes(record, dim)
        of = record["distribution"], record["interleaved"]
        base = first.setdefault(of, bytes_received)
        lines.append(
            [
                record["distribution"],
                "interleaved" if record["interleaved"] else "contiguous",
                f"{record['chips']}",
                f"{record['ids']:,}",
                f"{unique:,.0f}",
                f"{4 * dim * unique / limit:.3f}",
                f"{record['received'] * (4 * dim + 4) / limit:.3f}",
                f"{record['most_received'] * (4 * dim + 4) / limit:.3f}",
                f"{record['rounds']}",
                f"{bytes_received / 1e6:.3f}",
                f"{bytes_received / base:.3f}",
            ]
        )
    return header, lines


def received_bytes(record: Record, dim: int) -> float:
    """Returns what a device receives of a batch in the mean, messages of ids whole."""
    rows = 4 * dim * (record["unique"] + record["received"])
    messages = message_bytes(Quota(**record["quota"]), record["chips"])
    return rows + record["rounds"] * messages


def _records(found: Record, kind: str) -> list[Record]:
    return [record for record in found["records"] if record["kind"] == kind]


TABLES: dict[str, Callable[[Record], Table]] = {
    "Compiled: buffers that one device receives into, in one round": programs_table,
    "Simulated: what the ragged exchange is given": traffic_table,
}
