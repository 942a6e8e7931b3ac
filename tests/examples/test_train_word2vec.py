"""The example runs as a user runs it: as a script, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_word2vec.py"
STEPS = 600

TOPICS = (
    ("apple", "pear", "plum", "cherry", "grape", "lemon", "melon", "peach"),
    ("hammer", "saw", "drill", "nail", "screw", "chisel", "plane", "wrench"),
    ("violin", "flute", "drum", "harp", "oboe", "cello", "horn", "trumpet"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of sentences, each with words of one topic."""
    folder = tmp_path_factory.mktemp("word2vec")
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for part in ("a.txt", "b.txt"):
        topics = rng.integers(0, len(TOPICS), 500)
        sentences = [" ".join(rng.choice(TOPICS[topic], 12)) for topic in topics]
        (folder / "corpus" / part).write_text(".\n".join(sentences))
    return folder


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    """The output folder of a run from beginning to end."""
    out = folder / "unbroken"
    printed = finish(folder, out)
    assert "continuing" not in printed
    assert "Nearest neighbours" in printed
    return out


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    options = ["--quick", f"--steps={STEPS}", f"--corpus={folder / 'corpus'}"]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options, f"--out={out}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, out: Path) -> str:
    """Runs the example to its end and returns what it printed."""
    process = start(folder, out)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def saved_steps(out: Path) -> list[int]:
    """The checkpoints that are whole: one in the making has a longer name."""
    names = (path.name for path in out.glob("checkpoints-*/*"))
    return sorted(int(name) for name in names if name.isdecimal())


def last_checkpoint(out: Path) -> list[np.ndarray]:
    (checkpoints,) = out.glob("checkpoints-*")
    with ocp.CheckpointManager(checkpoints.absolute()) as manager:
        assert manager.latest_step() == STEPS
        run = manager.restore(STEPS, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run)]


def test_learns_the_topics(unbroken: Path) -> None:
    losses = next(leaf for leaf in last_checkpoint(unbroken) if leaf.shape == (STEPS,))
    assert np.isfinite(losses).all()
    assert losses[-50:].mean() < 0.9 * losses[:50].mean()

    with np.load(unbroken / "vectors.npz") as file:
        saved = dict(file)
    unit = saved["vectors"] / np.linalg.norm(saved["vectors"], axis=1, keepdims=True)
    topic = [
        next(t for t, words in enumerate(TOPICS) if word in words)
        for word in saved["words"]
    ]
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    assert np.array_equal(np.take(topic, cosine.argmax(1)), topic)


def test_draws_a_picture(unbroken: Path) -> None:
    picture = (unbroken / "word2vec.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_a_killed_run_ends_with_the_same_bits(folder: Path, unbroken: Path) -> None:
    out = folder / "broken"
    process = start(folder, out)
    deadline = time.monotonic() + 120
    while not saved_steps(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < saved_steps(out)[-1] < STEPS

    assert "continuing from the checkpoint" in finish(folder, out)
    for broken, whole in zip(
        last_checkpoint(out), last_checkpoint(unbroken), strict=True
    ):
        assert broken.dtype == whole.dtype
        assert broken.tobytes() == whole.tobytes()


def test_a_finished_run_shows_its_results_again(folder: Path, unbroken: Path) -> None:
    (unbroken / "word2vec.png").unlink()
    before = last_checkpoint(unbroken)
    assert "this run is finished" in finish(folder, unbroken)
    assert (unbroken / "word2vec.png").exists()
    for old, new in zip(before, last_checkpoint(unbroken), strict=True):
        assert old.tobytes() == new.tobytes()
