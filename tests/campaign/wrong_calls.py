"""Random calls of the C++ library itself, most of them wrong."""

from tests.campaign.record import Progress, Record
from tests.kernels.cpu import calls
from tests.kernels.cpu.call_draws import drawn

CALLS = 100  # of a seed


def run_group(record: Record, progress: Progress, seed: int) -> list[str]:
    """Makes the calls of a seed; returns a line for each that failed.

    A call is written to the file `last_call.txt` before it is made, since it may end
    the process.
    """
    lines = []
    for i in range(CALLS):
        number = CALLS * seed + i
        call = drawn(number)
        last = f"drawn({number}): {call}\n"
        (record.folder / "last_call.txt").write_text(last)
        try:
            outcome = calls.check(call)
        except Exception as error:
            outcome = "failed"
            text = f"{type(error).__name__}: {error}"[:2000]
            record.add({"seed": seed, "case": last, "status": outcome, "text": text})
            lines.append(f"seed {seed}: {text}: {last}")
            progress.failures += 1
        progress.cases += 1
        way = f"{call.target}, {outcome}"
        progress.ways[way] = progress.ways.get(way, 0) + 1
    return lines
