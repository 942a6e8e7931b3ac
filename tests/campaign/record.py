"""What a campaign has done so far, kept in files so that it can be ended any time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparse_adam.check.__main__ import ids_of
from sparse_adam.check.run import Outcome

TRIES = 2  # of a seed that ends the process, before it counts as a failure


@dataclasses.dataclass(slots=True)
class Progress:
    """What was run.

    Attributes:
        next: the seed to go on with.
        tries: how often that seed was begun and not ended.
        groups: how many seeds were run.
        cases: how many were run.
        steps: of all cases.
        rows: that were named by their batches, occurrences and padding included.
        failures: how many cases were wrong, raised or ended the process.
        seconds: that it took.
        worst: the largest error in units of its bound.
        ways: how many cases of each implementation and storage.
    """

    next: int = 0
    tries: int = 0
    groups: int = 0
    cases: int = 0
    steps: int = 0
    rows: int = 0
    failures: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    ways: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, outcome: Outcome) -> None:
        """Counts a case that was run."""
        case = outcome.case
        self.cases += 1
        self.steps += case.steps
        self.rows += case.steps * case.num_ids
        self.failures += outcome.failed
        if not outcome.failed:
            self.worst = max(self.worst, outcome.comparison.ratio)
        many = f" on {case.devices} devices" if case.devices > 1 else ""
        spread = ", batch too" if case.spread else ""
        what = " lookup" if case.kind == "lookup" else ""
        way = f"{case.way}{what}{many and ', rows spread'}{spread}"
        self.ways[way] = self.ways.get(way, 0) + 1

    def __str__(self) -> str:
        """The line of progress."""
        return (
            f"{self.cases:,} cases, {self.steps:,} steps, {self.rows:,} occurrences, "
            f"{self.failures} failures, largest error {self.worst:.2f} of its bound"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The files of a campaign in one folder."""

    folder: Path

    @property
    def state(self) -> Path:
        """The file with the progress."""
        return self.folder / "state.json"

    @property
    def failures(self) -> Path:
        """The file with a line of JSON for each failure."""
        return self.folder / "failures.jsonl"

    def load(self) -> Progress:
        """Returns the progress of the file, or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.state.exists():
            return Progress()
        return Progress(**json.loads(self.state.read_text()))

    def save(self, progress: Progress) -> None:
        """Replaces the file as a whole."""
        new = self.state.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(progress), indent=1))
        new.replace(self.state)

    def begin(self, progress: Progress) -> None:
        """Puts down that a seed is begun; gives up one that ends the process."""
        if progress.tries >= TRIES:
            self.add({"seed": progress.next, "status": "ended the process"})
            progress.failures += 1
            progress.next, progress.tries = progress.next + 1, 0
        progress.tries += 1
        self.save(progress)

    def end(self, progress: Progress) -> None:
        """Puts down that a seed was run."""
        progress.next, progress.tries = progress.next + 1, 0
        progress.groups += 1
        self.save(progress)

    def failed(self, seed: int, found: Outcome, smallest: Outcome) -> dict[str, Any]:
        """Adds a case that failed, as it was drawn and as it was shrunk."""
        line = {
            "seed": seed,
            "status": found.status,
            "case": f"{found.case.way} {found.case}",
            "text": found.text[:2000],
            "smallest": repr(smallest.case),
            "smallest_text": smallest.text[:2000],
            "smallest_ids": ids_of(smallest.case),
        }
        self.add(line)
        return line

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line to the failures."""
        with self.failures.open("a") as file:
            file.write(json.dumps(line) + "\n")
