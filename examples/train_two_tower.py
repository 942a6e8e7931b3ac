"""A recommender trained with the embedding API: a two-tower model to read.

    python examples/train_two_tower.py                  # a shop that it makes up
    python examples/train_two_tower.py --data log.csv   # with columns user and item
    python examples/train_two_tower.py --devices 4      # which share tables and batches

One tower makes a vector of a user and the items that the user chose last, the other one
of an item; the model learns to put a user near the item that is chosen next. There are
three tables, of users, items and categories; the first two are one stack, and have one
update. The history of a user and the candidates share the table of items, whose
gradients are the sums of both.

A step is the three lines of the embedding API:

1. `lookup` the activations of a batch of ids;
2. differentiate the loss by the towers and *by the activations*;
3. `apply_gradients` to the rows that were looked up.

Nothing of the size of a table is made on the way. All randomness comes from
(seed, step): a run that was killed and is started again with the same options continues
from its last checkpoint and ends with the same bits as one that was not. The measure is
recall@10: how often the item that a user chose last is among the ten nearest of all
items, beside that of recommending the ten most popular items to everyone.

The dense networks and the loss are in `towers.py`, the data in `interactions.py`.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from checkpoints import go_on_from, open_checkpoints
from devices import device_options, mesh_of, on_each
from interactions import (
    Device,
    Interactions,
    make_interactions,
    put_on_device,
    read_interactions,
    recall_of_popular,
    split,
)
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from towers import Towers, climb, dense_adam, loss_of, new_tower

from sparse_adam import bias_corrected_learning_rate
from sparse_adam.checkpoint import (
    RestoreArrays,
    RestoreTables,
    SaveArrays,
    SaveTables,
)
from sparse_adam.embedding import (
    Adam,
    EmbeddingState,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run depends on, apart from its data."""

    users: int = 20_000  # of the made-up shop, as the next two
    items: int = 10_000
    categories: int = 100
    steps: int = 3000
    steps_per_call: int = 100  # in one call of the jitted function
    steps_per_checkpoint: int = 500
    batch: int = 512
    history: int = 8  # items
    dim: int = 32
    hidden: int = 64
    learning_rate: float = 5e-3
    temperature: float = 0.1
    seed: int = 0


class Model(NamedTuple):
    """All that a step changes."""

    embedding: EmbeddingState
    towers: Towers
    momenta: Towers  # of the towers' own Adam
    velocities: Towers


class Run(NamedTuple):
    """What a run has come to, and what a checkpoint holds."""

    model: Model
    losses: np.ndarray  # float32 [steps], NaN where a step is yet to come
    recalls: np.ndarray  # float32 [checkpoints], as well


def new_model(
    settings: Settings, data: Interactions, mesh: Mesh | None = None
) -> Model:
    """Makes three tables, for four features, and two towers.

    The devices of a mesh share the rows of tables, and each has the towers. Then a
    lookup gives each device the activations of some of the samples, and XLA spreads
    the work of the towers in the same way.
    """
    dim = settings.dim
    user = TableConfig(data.num_users, dim, name="user")
    item = TableConfig(data.num_items, dim, name="item")
    category = TableConfig(data.num_categories, dim // 4, name="category")
    feature_config = {
        "user": FeatureConfig(user),
        "history": FeatureConfig(item),
        "item": FeatureConfig(item),
        "category": FeatureConfig(category),
    }
    optimizer = Adam(settings.learning_rate)
    keys = jax.random.split(jax.random.key(settings.seed), 3)
    towers = Towers(
        user=new_tower(keys[0], 2 * dim, settings.hidden, dim),
        item=new_tower(keys[1], dim + dim // 4, settings.hidden, dim),
    )
    zeros, more = (jax.tree.map(jnp.zeros_like, towers) for _ in range(2))
    embedding = init(feature_config, optimizer, keys[2], mesh=mesh)
    return Model(embedding, *on_each((towers, zeros, more), mesh))


def features_of(
    users: jax.Array, history: jax.Array, items: jax.Array, categories: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns ids and weights: the later an item of the history, the more it counts."""
    recency = 0.8 ** jnp.arange(history.shape[1], dtype=jnp.float32)
    weights = {"history": jnp.broadcast_to(recency, history.shape)}
    ids = {"user": users, "history": history, "item": items}
    ids["category"] = categories
    return ids, dict.fromkeys(ids) | weights


def train_step(
    model: Model, data: Device, step: jax.Array, settings: Settings
) -> tuple[Model, jax.Array]:
    """One step: draw a batch, look it up, differentiate, update rows and towers."""
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    drawn = jax.random.randint(key, (settings.batch,), 0, len(data.users))
    items = data.items[drawn]
    features, weights = features_of(
        data.users[drawn], data.history[drawn], items, data.categories[items]
    )
    popularity = data.log_popularity[items]
    rate = bias_corrected_learning_rate(settings.learning_rate, step + 1)

    activations = lookup(model.embedding, features, weights)
    loss, (by_towers, by_activations) = jax.value_and_grad(loss_of, argnums=(0, 1))(
        model.towers, activations, items, popularity, settings.temperature
    )
    embedding = apply_gradients(
        model.embedding,
        features,
        by_activations,
        weights,
        learning_rates=dict.fromkeys(model.embedding.tables, rate),
    )
    return Model(embedding, *dense_adam(*model[1:], by_towers, rate)), loss


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="model")
def train_steps(
    model: Model, data: Device, steps: jax.Array, *, settings: Settings
) -> tuple[Model, jax.Array]:
    """Several steps in one call, in place; returns the model and each step's loss."""

    def step(model: Model, now: jax.Array) -> tuple[Model, jax.Array]:
        return train_step(model, data, now, settings)

    return jax.lax.scan(step, model, steps)


@jax.jit
def found(model: Model, examples: Device, some: np.ndarray) -> jax.Array:
    """Counts of some of the examples whose item is among the nearest ten."""
    items = jnp.arange(len(examples.categories))
    candidates, _ = features_of(
        jnp.full_like(items, -1),
        jnp.full((len(items), 1), -1),
        items,
        examples.categories,
    )
    known = lookup(model.embedding, candidates)
    vectors = climb(model.towers.item, known["item"], known["category"])
    users, history = examples.users[some], examples.history[some]
    asked = jnp.full_like(users, -1)
    activations = lookup(model.embedding, *features_of(users, history, asked, asked))
    user = climb(model.towers.user, activations["user"], activations["history"])
    scores = user @ vectors.T
    own = jnp.take_along_axis(scores, examples.items[some][:, None], axis=1)
    return jnp.sum(jnp.sum(scores > own, axis=1) < 10)


def recall(model: Model, examples: Device) -> float:
    """Returns recall@10 of up to 2000 users, 500 at a time."""
    size = min(500, len(examples.users))
    count = min(2000, len(examples.users)) // size * size
    chunks = np.arange(count, dtype=np.int32).reshape(-1, size)
    return sum(int(found(model, examples, some)) for some in chunks) / count


def train(
    data: Interactions,
    settings: Settings,
    checkpoints: ocp.CheckpointManager,
    console: Console,
    mesh: Mesh | None = None,
) -> Run:
    """Trains from the last checkpoint, or from the beginning, to the end."""
    train_on, test_on = (
        put_on_device(examples, data, mesh)
        for examples in split(data, settings.history)
    )
    losses = np.full(settings.steps, np.nan, np.float32)
    every = settings.steps_per_checkpoint
    recalls = np.full(-(-settings.steps // every), np.nan, np.float32)
    model = new_model(settings, data, mesh)
    like = ocp.args.Composite(
        tables=RestoreTables(model.embedding),
        others=RestoreArrays(without_tables(Run(model, losses, recalls))),
    )
    first, found = 0, go_on_from(checkpoints, like)
    if found:
        first, (model, losses, recalls) = found.step, found.items.others
        model = model._replace(embedding=found.items.tables)
        console.print(f"continuing from the checkpoint of step {first:,}")

    with progress_bar(console) as bar:
        task = bar.add_task(
            "", total=settings.steps, completed=first, loss=0, recall=0, speed=0
        )
        for start in range(first, settings.steps, settings.steps_per_call):
            began = time.perf_counter()
            done = min(start + settings.steps_per_call, settings.steps)
            steps = np.arange(start, done, dtype=np.int32)
            model, losses[start:done] = train_steps(
                model, train_on, steps, settings=settings
            )
            speed = (done - start) * settings.batch / (time.perf_counter() - began)
            if done % every == 0 or done == settings.steps:
                recalls[(done - 1) // every] = recall(model, test_on)
                others = without_tables(Run(model, losses, recalls))
                args = ocp.args.Composite(
                    tables=SaveTables(model.embedding), others=SaveArrays(others)
                )
                checkpoints.save(done, args=args)
                bar.update(task, recall=recalls[(done - 1) // every])
            mean = losses[start:done].mean()
            bar.update(task, completed=done, loss=mean, speed=speed)
    return Run(model, losses, recalls)


def without_tables(run: Run) -> Run:
    """Returns all of a run that is no table; tables are an item of their own."""
    return run._replace(model=run.model._replace(embedding=None))


def progress_bar(console: Console) -> Progress:
    """Returns a bar whose task has the fields `loss`, `recall` and `speed`."""
    fields = "loss {task.fields[loss]:.3f}, recall@10 {task.fields[recall]:.3f}"
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn(fields + ", {task.fields[speed]:,.0f} examples/s"),
        TimeRemainingColumn(),
        console=console,
    )


def results(run: Run, settings: Settings, popular: float) -> Table:
    """Returns a table of the loss and recall at each checkpoint."""
    table = Table("step", "loss", "recall@10", title="Two towers")
    every = settings.steps_per_checkpoint
    for i, value in enumerate(run.recalls):
        losses = run.losses[i * every : (i + 1) * every]
        step = min((i + 1) * every, settings.steps)
        table.add_row(f"{step:,}", f"{losses.mean():.3f}", f"{value:.3f}")
    table.add_section()
    table.add_row("the most popular items", "", f"{popular:.3f}")
    return table


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--data",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CSV file with the columns user and item.  [default: a made-up shop]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs/two_tower",
    show_default=True,
    help="Folder for checkpoints.",
)
@click.option("--steps", type=click.IntRange(1), help="Length of the run.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="A short run in a small shop, for tests.")
@device_options
def main(
    path: Path | None,
    out: Path,
    steps: int | None,
    seed: int,
    quick: bool,
    **devices: Any,
) -> None:
    """Trains, and shows how well."""
    mesh = mesh_of(**devices)
    console = Console(quiet=jax.process_index() > 0)
    settings = Settings(seed=seed)
    if quick:
        settings = dataclasses.replace(
            settings,
            users=2000,
            items=1000,
            categories=20,
            steps=400,
            steps_per_call=50,
            steps_per_checkpoint=100,
            batch=256,
        )
    if steps:
        settings = dataclasses.replace(settings, steps=steps)
    if path is None:
        shop = (settings.users, settings.items, settings.categories)
        data = make_interactions(*shop, seed)
    else:
        try:
            data = read_interactions(path)
        except ValueError as error:
            raise click.ClickException(f"{error}") from error
    train_on, test_on = split(data, settings.history)
    if not len(train_on.users) or not len(test_on.users):
        raise click.ClickException("no user has two events or more")
    console.print(
        f"{len(data.users):,} events of {data.num_users:,} users with "
        f"{data.num_items:,} items of {data.num_categories:,} categories"
    )
    with open_checkpoints(out, settings, data.fingerprint()) as checkpoints:
        if checkpoints.latest_step() == settings.steps:
            console.print("this run is finished: showing its results again")
        run = train(data, settings, checkpoints, console, mesh)
    popular = recall_of_popular(train_on, test_on, data.num_items)
    console.print(results(run, settings, popular))


if __name__ == "__main__":
    main()
