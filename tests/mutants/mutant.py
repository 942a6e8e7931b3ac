"""A mutant: a small fault in a file, and the test that must find it."""

import dataclasses
import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """One small fault.

    Attributes:
        file: from the root of the repository.
        search: the text that is replaced; it occurs once in the file.
        replace: the faulty text.
        test: what must fail, as pytest names it.
        hangs: whether the fault may make the test wait for ever.
    """

    file: str
    search: str
    replace: str
    test: str
    hangs: bool = False

    @property
    def key(self) -> str:
        """A short name that changes with the mutant."""
        text = "\0".join((self.file, self.search, self.replace, self.test))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def test_file(self) -> str:
        """The file of the test."""
        return self.test.partition("::")[0]

    @property
    def test_function(self) -> str:
        """The name of the test, without its parameters."""
        return self.test.partition("::")[2].partition("[")[0]

    def applied(self, root: Path = ROOT) -> str:
        """Returns the text of the file with the fault in it.

        Raises:
            ValueError: the text to be replaced is not there, or more than once.
        """
        text = (root / self.file).read_text()
        if (count := text.count(self.search)) != 1:
            raise ValueError(
                f"{self.file} has {count} times {self.search!r}: a mutant's text must "
                "occur once"
            )
        return text.replace(self.search, self.replace)

    def __str__(self) -> str:
        """The fault in one line."""
        return f"{self.file}: {_flat(self.search)} -> {_flat(self.replace)}"


def _flat(text: str) -> str:
    """Returns a text on one line."""
    return " ".join(text.split()) or "(nothing)"
