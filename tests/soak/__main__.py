"""The command line: `python -m tests.soak --minutes 60`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import collections
import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from tests.soak.life import (
    EVERY,
    Life,
    begun,
    digest,
    harm,
    path_of,
    saved_steps,
)

# What ends a life, and how often.
ENDS = {"kill": 3, "kill in a save": 4, "corrupt": 3, "full disk": 2, "no memory": 2}
NO_ROOM = re.compile(r"No space left|File too large|NoSpace|RESOURCE_EXHAUSTED")
WAIT, START, PAUSE, SAVE = 300.0, 15.0, 0.5, 0.1  # seconds, at most


@dataclasses.dataclass
class Soak:
    """A training, its checkpoints, and what they should be.

    Attributes:
        out: the folder of the log.
        folder: of the checkpoints.
        steps: of a whole training; then the next one begins.
        rng: draws what happens.
        reference: what `digest` is at each checkpoint of a run that nothing disturbed.
        harmed: the checkpoints in which a file was changed.
        counts: how often each thing happened.
        faults: what went wrong.
    """

    out: Path
    folder: Path
    steps: int
    rng: np.random.Generator
    reference: dict[int, str] = dataclasses.field(default_factory=dict)
    harmed: set[int] = dataclasses.field(default_factory=set)
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    faults: list[str] = dataclasses.field(default_factory=list)

    def prepare(self) -> None:
        """Trains once from beginning to end, and keeps what each checkpoint has."""
        whole = self.out / "whole"
        for folder in (whole, self.folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        life = Life(self.out, whole, self.steps, keep="all")
        life.wait(20 * WAIT)
        if life.process.returncode != 0:
            raise click.ClickException(f"the example failed: {life.output}")
        self.reference = {step: digest(whole, step) for step in saved_steps(whole)}
        shutil.rmtree(whole)

    def live(self, end: str) -> None:
        """Starts the training, ends it in some way, and checks what is left of it."""
        may_begin_at = self.may_begin_at()
        life = Life(self.out, self.folder, self.steps)
        told = ""
        try:
            if end == "kill" and self.rng.random() < 0.3:  # before it trains, or soon
                life.wait(self.rng.uniform(0, START))
            else:
                more = int(self.rng.integers(5 * EVERY))
                life.wait(WAIT, lambda: life.made >= more)
                life.wait(self.rng.uniform(0, PAUSE))
            if end == "kill in a save":
                life.wait(WAIT, lambda: begun(self.folder))
                time.sleep(self.rng.uniform(0, SAVE))
            elif end == "full disk":
                ballast = life.fill_disk(self.folder)
                life.wait(WAIT)
                ballast.unlink(missing_ok=True)
            elif end == "no memory":
                life.limit_memory(int(self.rng.integers(2**26)))
                life.wait(WAIT)
        finally:
            status = life.process.poll()
            life.kill()
        self.check(life, status, end, may_begin_at)
        if end == "corrupt" and len(saved_steps(self.folder)) > 1 and not self.harmed:
            last = saved_steps(self.folder)[0]
            told = harm(path_of(self.folder, last), self.rng)
            self.harmed.add(last)
            self.counts[told.partition(":")[0]] += 1
        self.log(life, status, end, told)
        if status == 0 and not self.faults:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.harmed.clear()

    def may_begin_at(self) -> set[int]:
        """Returns the steps of which one is where the next life has to begin.

        A harmed checkpoint may still be read, if all its numbers are right.
        """
        last = [*saved_steps(self.folder)[:2], 0]
        return set(last[:2]) if last[0] in self.harmed else {last[0]}

    def check(self, life: Life, status: int | None, end: str, begin: set[int]) -> None:
        """Puts down each thing that is not as it must be after a life."""
        made, saved = life.steps, saved_steps(self.folder)
        if made and made[0] not in begin:
            self.fault(f"began at step {made[0]}, not at one of {begin}")
        last = saved[0] if saved else 0
        # Before a checkpoint is begun, the one before is whole.
        if made and last < made[-1] // EVERY * EVERY - EVERY:
            self.fault(f"had made {made[-1]} steps, and the last checkpoint is {last}")
        if made:  # what was passed over is deleted, and what was restored is whole
            self.harmed = {step for step in self.harmed if step < made[0]}
        for step in set(saved[:2]) - self.harmed:
            found = digest(self.folder, step)
            if found != self.reference[step]:
                self.fault(f"other bits at step {step}: {found}")
        self.counts["checkpoints compared"] += len(set(saved[:2]) - self.harmed)
        if len(begun(self.folder)) > 1 or len(saved) > 3:
            self.fault(f"left {begun(self.folder)} and {saved}")
        if status not in (None, 0) and end not in ("full disk", "no memory"):
            self.fault(f"ended with status {status}: {life.output}")
        if end == "full disk" and status and not NO_ROOM.search(life.output):
            self.fault(f"did not say that the disk is full: {life.output}")
        if status == 0 and saved[:1] != [self.steps]:
            self.fault(f"ended well, with checkpoints {saved}")
        self.counts["killed with a checkpoint begun"] += len(begun(self.folder))
        self.counts["passed over a checkpoint"] += "cannot be restored" in life.output
        self.counts[f"{end}: " + _words(status)] += 1
        self.counts["steps"] += life.made

    def fault(self, what: str) -> None:
        """Puts down that something is wrong."""
        self.faults.append(what)

    def log(self, life: Life, status: int | None, end: str, told: str) -> None:
        """Adds a line to the log."""
        errors = [x for x in life.output.splitlines() if "Error" in x or "what()" in x]
        line = {
            "end": end,
            "status": status,
            "steps": (life.steps[:1] + life.steps[-1:]) or None,
            "saved": saved_steps(self.folder),
            "harm": told,
            "words": errors[-1][:300] if errors and status else "",
            "faults": self.faults,
        }
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def __str__(self) -> str:
        counts = (f"{name}: {n:,}" for name, n in sorted(self.counts.items()))
        return "; ".join((*counts, f"faults: {len(self.faults)}"))


def _words(status: int | None) -> str:
    return {None: "killed", 0: "at its end"}.get(status, "raised")


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="How long to go on.")
@click.option("--lives", default=sys.maxsize, help="End after so many.")
@click.option("--steps", default=3000, show_default=True, help="Of a whole training.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    default=Path("runs/soak"),
    type=click.Path(path_type=Path),
    show_default=True,
    help="The folder of the log.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Of the checkpoints; on a disk below 256 MiB it is filled.  [default: in out]",
)
def main(
    minutes: float, lives: int, steps: int, seed: int, out: Path, folder: Path | None
) -> None:
    """Kills the two-tower example again and again, harms its checkpoints, and checks.

    Each time it must go on from the last whole checkpoint, and each checkpoint must
    have the bits of a run that nothing disturbed. The exit status is 1 if not.
    """
    soak = Soak(out, folder or out / "checkpoints", steps, np.random.default_rng(seed))
    soak.prepare()
    begin = time.monotonic()
    shares = np.array(list(ENDS.values())) / sum(ENDS.values())
    form = "{percentage:3.0f}% of the time, {elapsed} of it: {desc}"
    patience = 0.1 if sys.stderr.isatty() else 60.0  # seconds
    with tqdm(total=60 * minutes, bar_format=form, mininterval=patience) as bar:
        for number in range(lives):
            if time.monotonic() - begin > 60 * minutes or soak.faults:
                break
            soak.live(str(soak.rng.choice(list(ENDS), p=shares)))
            bar.set_description_str(f"{number + 1} lives; {soak}", refresh=False)
            bar.update(min(time.monotonic() - begin, bar.total) - bar.n)
    click.echo(str(soak).replace("; ", "\n"))
    sys.exit(int(bool(soak.faults)))


if __name__ == "__main__":
    main()
