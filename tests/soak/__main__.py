"""The command line: `python -m tests.soak --minutes 60`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import collections
import hashlib
import re
import shutil
import sys
import time
from pathlib import Path

import click
import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from tests.soak.life import Life

EVERY = 100  # steps between checkpoints, as the example has with --quick
# What ends a life, and how often.
ENDS = {"kill": 3, "kill in a save": 4, "corrupt": 3, "full disk": 2, "no memory": 2}
NO_ROOM = re.compile(r"No space left|File too large|NoSpace|RESOURCE_EXHAUSTED")
WAIT, START, PAUSE, SAVE = 300.0, 15.0, 0.5, 0.1  # seconds, at most


class Soak:
    """A training, its checkpoints, and those of one that nothing disturbed."""

    def __init__(self, out: Path, folder: Path, steps: int, seed: int) -> None:
        self.out, self.folder, self.steps = out, folder, steps
        self.rng = np.random.default_rng(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.harmed: set[int] = set()  # steps of checkpoints with a changed file
        whole = out / "whole"
        for made in (whole, folder):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
        life = Life(out, whole, steps, keep="all")
        if life.process.wait() != 0:
            raise click.ClickException(f"the example failed: {life.output}")
        self.reference = {step: digest(whole, step) for step in saved_steps(whole)}

    def live(self, end: str) -> None:
        """Starts the training, ends it in some way, and checks what is left of it."""
        saved = [*saved_steps(self.folder)[:2], 0]
        # A harmed checkpoint may be read if all of its numbers are right.
        may_begin_at = saved[:2] if saved[0] in self.harmed else saved[:1]
        life = Life(self.out, self.folder, self.steps)
        try:
            self.wait_for(life, end)
        finally:
            status = life.kill()
        known = len(self.faults)
        self.check(life, status, end, may_begin_at)
        told = ""
        if end == "corrupt" and len(saved_steps(self.folder)) > 1 and not self.harmed:
            last = saved_steps(self.folder)[0]
            told = harm(path_of(self.folder, last), self.rng)
            self.harmed.add(last)
            self.counts[told.partition(":")[0]] += 1
        errors = [x for x in life.output.splitlines() if "Error" in x or "what()" in x]
        with (self.out / "log.txt").open("a") as file:
            file.write(
                f"{end}, status {status}: {life.made} steps from {life.first} on, now "
                f"{saved_steps(self.folder)} {told}\n"
            )
            file.writelines(f"  {line[:200]}\n" for line in errors[-1:] if status)
            file.writelines(f"FAULT: {fault}\n" for fault in self.faults[known:])
        if status == 0 and not self.faults:  # the next training begins
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self.harmed.clear()

    def wait_for(self, life: Life, end: str) -> None:
        """Returns when the life is to be killed, or has ended."""
        if end == "kill" and self.rng.random() < 0.3:  # before it trains, or soon
            return life.wait(self.rng.uniform(0, START))
        more = int(self.rng.integers(5 * EVERY))
        life.wait(WAIT, lambda: life.made >= more)
        life.wait(self.rng.uniform(0, PAUSE))
        if end == "kill in a save":
            life.wait(WAIT, lambda: begun(self.folder))
            life.wait(self.rng.uniform(0, SAVE))
        elif end == "full disk":
            ballast = life.fill_disk(self.folder)
            life.wait(WAIT)
            ballast.unlink(missing_ok=True)
        elif end == "no memory":
            life.limit_memory(int(self.rng.integers(2**26)))
            life.wait(WAIT)
        return None

    def check(
        self, life: Life, status: int | None, end: str, may_begin_at: list[int]
    ) -> None:
        """Puts down each thing that is not as it must be after a life."""
        saved = saved_steps(self.folder)
        last = saved[0] if saved else 0
        if life.first is not None:
            if life.first not in may_begin_at:
                self.faults.append(f"began at {life.first}, not one of {may_begin_at}")
            # Before a checkpoint is begun, the one before is whole.
            made = life.first + life.made
            if last < made // EVERY * EVERY - EVERY:
                self.faults.append(f"made {made} steps, and the last saved is {last}")
            # What was passed over is deleted, and what was restored is whole.
            self.harmed = {step for step in self.harmed if step < life.first}
        for step in set(saved[:2]) - self.harmed:
            found = digest(self.folder, step)
            if found != self.reference[step]:
                self.faults.append(f"other bits at step {step}: {found}")
            self.counts["checkpoints compared"] += 1
        if len(begun(self.folder)) > 1 or len(saved) > 3:
            self.faults.append(f"left {begun(self.folder)} and {saved}")
        if status and end not in ("full disk", "no memory"):
            self.faults.append(f"ended with status {status}: {life.output}")
        if status and end == "full disk" and not NO_ROOM.search(life.output):
            self.faults.append(f"did not say that the disk is full: {life.output}")
        if status == 0 and last != self.steps:
            self.faults.append(f"ended well, with checkpoints {saved}")
        how = "killed" if status is None else "raised" if status else "at its end"
        self.counts[f"{end}: {how}"] += 1
        self.counts["left a checkpoint begun"] += len(begun(self.folder))
        self.counts["passed over a checkpoint"] += "cannot be restored" in life.output
        self.counts["steps"] += life.made

    def __str__(self) -> str:
        counts = (f"{name}: {n:,}" for name, n in sorted(self.counts.items()))
        return "; ".join((*counts, f"faults: {len(self.faults)}"))


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints that have their names, the last one first.

    The third one may be half deleted.
    """
    names = (path.name for path in folder.glob("checkpoints-*/*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def begun(folder: Path) -> list[Path]:
    """Returns the checkpoints that are being written, or were."""
    return [x for x in folder.glob("checkpoints-*/*") if "tmp" in x.name]


def path_of(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is."""
    (found,) = folder.glob(f"checkpoints-*/{step}")
    return found.absolute()


def digest(folder: Path, step: int) -> str:
    """Returns what tells all bits of a checkpoint; reads them by Orbax alone."""
    hashed = hashlib.sha256()
    with ocp.StandardCheckpointer() as reader:
        for item in ("others", "tables"):
            try:
                tree = reader.restore(path_of(folder, step) / item)
            except Exception as error:  # whatever Orbax meets in a broken file
                return f"unreadable: {error}"
            for path, array in jax.tree.leaves_with_path(tree):
                hashed.update(f"{path}{array.dtype}{array.shape}".encode())
                hashed.update(np.asarray(array).tobytes())
    return hashed.hexdigest()


def harm(checkpoint: Path, rng: np.random.Generator) -> str:
    """Truncates or deletes a file of a checkpoint, or turns a bit; tells which."""
    files = sorted(x for x in checkpoint.glob("*/**/*") if x.is_file())
    file = files[int(rng.integers(len(files)))]
    data = bytearray(file.read_bytes())
    kind = ("truncated", "deleted", "a bit turned")[int(rng.integers(3))]
    if kind == "truncated":
        os.truncate(file, int(rng.integers(len(data))))
    elif kind == "deleted":
        file.unlink()
    else:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
    return f"{kind}: {checkpoint.name}/{file.relative_to(checkpoint)}"


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="How long to go on.")
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
    help="Of the checkpoints; a disk below 256 MiB is filled.  [default: in out]",
)
def main(minutes: float, steps: int, seed: int, out: Path, folder: Path | None) -> None:
    """Kills the two-tower example again and again, harms its checkpoints, and checks.

    Each time it must go on from the last whole checkpoint, and each checkpoint must
    have the bits of a run that nothing disturbed. The exit status is 1 if not, at the
    first fault, and the checkpoints stay.
    """
    soak = Soak(out, folder or out / "checkpoints", steps, seed)
    begin, seconds, lives = time.monotonic(), round(60 * minutes), 0
    shares = np.array(list(ENDS.values())) / sum(ENDS.values())
    form = "{percentage:3.0f}% of the time, {elapsed} of it: {desc}"
    patience = 0.1 if sys.stderr.isatty() else 60.0  # seconds
    with tqdm(total=seconds, bar_format=form, mininterval=patience) as bar:
        while bar.n < seconds and not soak.faults:
            soak.live(str(soak.rng.choice(list(ENDS), p=shares)))
            lives += 1
            bar.set_description_str(f"{lives} lives; {soak}", refresh=False)
            bar.update(min(round(time.monotonic() - begin), seconds) - bar.n)
    click.echo(f"{lives} lives; {soak}".replace("; ", "\n"))
    click.echo("\n".join(soak.faults))
    sys.exit(int(bool(soak.faults)))


if __name__ == "__main__":
    main()
