"""What became of each mutant, and the table of it in the docs."""

import dataclasses
import json
from pathlib import Path

from tests.mutants.lists import AREAS, mutants
from tests.mutants.mutant import ROOT

FILE = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants -->", "<!-- end of mutants -->"


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant.

    Attributes:
        area: of its list.
        fault: in one line.
        test: that failed, or was to fail.
        status: "failed", as it must; "killed", where besides the test passes without
            the fault, and "unsound", where it does not; "survived"; "hung", where it
            took too long; or "broken", where the fault does not compile or cannot be
            imported.
        seconds: that it took.
        text: the end of what pytest said, unless it was killed.
    """

    area: str
    fault: str
    test: str
    status: str
    seconds: float
    text: str


class Results:
    """The results of the present mutants, by `Mutant.key`, and their file."""

    def __init__(self, by_key: dict[str, Result], file: Path = FILE) -> None:
        self.by_key = by_key
        self._file = file

    @classmethod
    def load(cls, file: Path = FILE) -> "Results":
        """Returns those of the file that are of mutants which are still listed."""
        listed = {mutant.key for own in mutants().values() for mutant in own}
        found = json.loads(file.read_text()) if file.exists() else {}
        kept = {key: Result(**x) for key, x in found.items() if key in listed}
        return cls(kept, file)

    def __contains__(self, key: str) -> bool:
        """Whether a mutant has a result."""
        return key in self.by_key

    def add(self, key: str, result: Result) -> None:
        """Keeps a result, in the file too."""
        self.by_key[key] = result
        own = {key: dataclasses.asdict(x) for key, x in sorted(self.by_key.items())}
        self._file.write_text(json.dumps(own, indent=1) + "\n")


def table(found: Results) -> str:
    """Returns the table by area, in Markdown."""
    lines = ["| area | mutants | run | killed | share |", "|---|---|---|---|---|"]
    counts = []
    for area, title in AREAS.items():
        own = [found.by_key.get(mutant.key) for mutant in mutants()[area]]
        killed = sum(x is not None and x.status == "killed" for x in own)
        counts.append((len(own), sum(x is not None for x in own), killed))
        lines.append(_line(title, *counts[-1]))
    lines.append(_line("all", *(sum(x) for x in zip(*counts, strict=True))))
    return "\n".join(lines)


def _line(title: str, listed: int, run: int, killed: int) -> str:
    share = f"{killed / run:.0%}" if run else ""
    return f"| {title} | {listed} | {run} | {killed} | {share} |"


def write_table(found: Results, page: Path = PAGE) -> None:
    """Puts the table into the page, between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")
