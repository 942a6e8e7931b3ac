"""Word vectors trained with `sparse_adam_update`: a whole training run to read.

    python examples/train_word2vec.py                      # Python's own library
    python examples/train_word2vec.py --corpus my_texts    # any other text

Skip-gram with negative sampling learns a vector for each word by telling the words
around it from words drawn at random. The model is two embedding tables of V rows, and
a step reads and updates only the rows of the words that it meets:

1. gather those rows from the tables;
2. compute the loss and its gradients *by the gathered rows*, so that nothing of the
   size of a table is made;
3. hand ids and gradients to `sparse_adam_update`, once for each table. It sums the
   gradients of a word met twice, and ignores the id -1, which is padding here.

All randomness comes from (seed, step). A run that was killed and is started again with
the same options continues from its last checkpoint and ends with the same bits as one
that was not. At the end it prints the nearest neighbours of a few words, and leaves
`word2vec.png` (the loss, and a map of common words) and `vectors.npz` in its folder.

Source: T. Mikolov et al., "Distributed representations of words and phrases and their
compositionality" (2013).
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from checkpoints import go_on_from, open_checkpoints
from corpus import Corpus, Text, draw_batch, put_on_device, read_corpus
from report import draw, nearest_neighbours, progress_bar
from rich.console import Console

from sparse_adam import AdamState, bias_corrected_learning_rate, sparse_adam_update
from sparse_adam.checkpoint import RestoreArrays, SaveArrays

# Words of the standard library whose neighbours are worth a look.
FAMILIAR = ("FileNotFoundError", "directory", "encode", "float", "gzip")
FAMILIAR += ("month", "red", "socket", "thread", "three")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run depends on, apart from its text."""

    steps: int = 4000
    steps_per_call: int = 50  # in one call of the jitted function
    steps_per_checkpoint: int = 500
    passages: int = 64  # of text, in a batch
    passage_length: int = 32  # in words
    window: int = 3  # words to the left and to the right, at most
    negatives: int = 256  # random words in a batch
    negative_weight: float = 5.0  # of all the negatives, for one pair of words
    subsampling: float = 3e-4
    dim: int = 64
    learning_rate: float = 5e-3
    warm_up: float = 0.05  # part of the steps
    seed: int = 0


class Model(NamedTuple):
    """Two embedding tables with their Adam slots: V rows each, one for each word."""

    centres: AdamState  # the word in the middle of a window
    contexts: AdamState  # the words around it


class Run(NamedTuple):
    """What a checkpoint holds."""

    model: Model
    losses: np.ndarray  # float32 [steps], NaN where a step is yet to come


def new_model(settings: Settings, num_words: int) -> Model:
    """Small random vectors for centres, zeros for contexts and for all slots."""
    shape = (num_words, settings.dim)
    small = jax.random.normal(jax.random.key(settings.seed), shape) / settings.dim
    return Model(
        centres=AdamState(small, jnp.zeros(shape), jnp.zeros(shape)),
        contexts=AdamState(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape)),
    )


def loss_of_rows(
    rows: tuple[jax.Array, jax.Array, jax.Array], pairs: jax.Array, weight: float
) -> jax.Array:
    """Returns the loss of a pair: small where its words agree and negatives do not."""
    centre, context, negative = rows
    agreement = jnp.einsum("bid,bjd->bij", centre, context)
    with_negatives = jnp.einsum("bid,kd->bik", centre, negative)
    attract = jnp.sum(jax.nn.softplus(-agreement), where=pairs)
    repel = jnp.sum(pairs.sum(2) * jax.nn.softplus(with_negatives).mean(2))
    return (attract + weight * repel) / pairs.sum()


def train_step(
    model: Model, text: Text, step: jax.Array, rate: jax.Array, settings: Settings
) -> tuple[Model, jax.Array]:
    """One step: draw a batch, gather its rows, differentiate, update those rows."""
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    shape = (settings.passages, settings.passage_length)
    batch = draw_batch(text, key, shape, settings.window, settings.negatives)

    # Padding gathers some row; no pair has it, so its gradient is zero.
    rows = (
        model.centres.table[batch.passages],
        model.contexts.table[batch.passages],
        model.contexts.table[batch.negatives],
    )
    loss, grads = jax.value_and_grad(loss_of_rows)(
        rows, batch.pairs, settings.negative_weight
    )
    by_centre, by_context, by_negative = (g.reshape(-1, settings.dim) for g in grads)

    words = batch.passages.reshape(-1)
    centres = sparse_adam_update(*model.centres, words, by_centre, learning_rate=rate)
    contexts = sparse_adam_update(
        *model.contexts,
        jnp.concatenate([words, batch.negatives]),
        jnp.concatenate([by_context, by_negative]),
        learning_rate=rate,
    )
    return Model(centres, contexts), loss


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="model")
def train_steps(
    model: Model, text: Text, steps: jax.Array, rates: jax.Array, *, settings: Settings
) -> tuple[Model, jax.Array]:
    """Several steps in one call, in place; returns the model and each step's loss."""

    def step(model: Model, now: tuple[jax.Array, jax.Array]) -> tuple[Model, jax.Array]:
        return train_step(model, text, *now, settings)

    return jax.lax.scan(step, model, (steps, rates))


def learning_rates(steps: np.ndarray, settings: Settings) -> jax.Array:
    """Linear warm-up, then linear decay to zero, with Adam's bias correction."""
    done = (steps + 0.5) / settings.steps
    schedule = np.minimum(done / settings.warm_up, (1 - done) / (1 - settings.warm_up))
    return bias_corrected_learning_rate(settings.learning_rate, steps + 1) * schedule


def begin_or_continue(
    checkpoints: ocp.CheckpointManager, settings: Settings, num_words: int
) -> tuple[int, Run]:
    """Returns the number of steps done, and the run at that point."""
    losses = np.full(settings.steps, np.nan, np.float32)
    run = Run(new_model(settings, num_words), losses)
    found = go_on_from(checkpoints, RestoreArrays(run))
    return (found.step, found.items) if found else (0, run)


def train(
    corpus: Corpus,
    settings: Settings,
    checkpoints: ocp.CheckpointManager,
    console: Console,
) -> Run:
    """Trains from the last checkpoint, or from the beginning, to the end."""
    text = put_on_device(corpus, settings.subsampling)
    first, (model, losses) = begin_or_continue(checkpoints, settings, len(corpus.words))
    if first == settings.steps:
        console.print("this run is finished: here are its results again")
        return Run(model, losses)
    if first:
        console.print(f"continuing from the checkpoint of step {first:,}")

    words_per_step = 2 * settings.passages * settings.passage_length
    with progress_bar(console) as bar:
        task = bar.add_task("", total=settings.steps, completed=first, loss=0, speed=0)
        for start in range(first, settings.steps, settings.steps_per_call):
            began = time.perf_counter()
            done = min(start + settings.steps_per_call, settings.steps)
            steps = np.arange(start, done)
            model, losses[start:done] = train_steps(
                model,
                text,
                jnp.asarray(steps),
                learning_rates(steps, settings),
                settings=settings,
            )
            bar.update(
                task,
                completed=done,
                loss=losses[start:done].mean(),
                speed=len(steps) * words_per_step / (time.perf_counter() - began),
            )
            if done % settings.steps_per_checkpoint == 0 or done == settings.steps:
                checkpoints.save(done, args=SaveArrays(Run(model, losses)))
    return Run(model, losses)


def choose_queries(
    corpus: Corpus, own_text: bool, asked: tuple[str, ...]
) -> tuple[str, ...]:
    """The words asked for, or some that the text has."""
    missing = [word for word in asked if word not in corpus.words]
    if missing:
        raise click.ClickException(f"not in the text, or too rare: {missing}")
    if asked:
        return asked
    if own_text:
        return tuple(word for word in corpus.words if len(word) > 4)[:200:20]
    return tuple(word for word in FAMILIAR if word in corpus.words)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--corpus",
    "corpus_path",
    type=click.Path(exists=True, path_type=Path),
    help="A file or folder of text.  [default: Python's standard library]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs/word2vec",
    show_default=True,
    help="Folder for checkpoints and results.",
)
@click.option("--word", "asked", multiple=True, help="Show its neighbours; repeatable.")
@click.option("--steps", type=click.IntRange(1), help="Length of the run.")
@click.option("--min-count", default=10, show_default=True, help="Drop rarer words.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="A short run on small batches, for tests.")
def main(
    corpus_path: Path | None,
    out: Path,
    asked: tuple[str, ...],
    steps: int | None,
    min_count: int,
    seed: int,
    quick: bool,
) -> None:
    """Reads the text, trains, and shows what came of it."""
    console = Console()
    settings = Settings(seed=seed)
    if quick:
        settings = dataclasses.replace(
            settings, steps=200, steps_per_call=25, steps_per_checkpoint=50, passages=16
        )
    if steps:
        settings = dataclasses.replace(settings, steps=steps)

    corpus = read_corpus(corpus_path, min_count)
    size = f"{len(corpus.text):,} words, {len(corpus.words):,} different ones"
    if len(corpus.text) < 2 * settings.passage_length or len(corpus.words) < 20:
        raise click.ClickException(
            f"too little text: {size}, of those that occur {min_count} times or more"
        )
    console.print(size)
    queries = choose_queries(corpus, corpus_path is not None, asked)

    with open_checkpoints(out, settings, corpus.fingerprint()) as checkpoints:
        run = train(corpus, settings, checkpoints, console)

    vectors = np.asarray(run.model.centres.table)
    np.savez(out / "vectors.npz", words=corpus.words, vectors=vectors)
    console.print(nearest_neighbours(corpus.words, vectors, queries))
    draw(out / "word2vec.png", run.losses, corpus.words, vectors, queries)
    console.print(f"final loss {run.losses[-100:].mean():.3f}; see {out}/word2vec.png")


if __name__ == "__main__":
    main()
