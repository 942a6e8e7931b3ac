"""What a run shows: a progress bar, the nearest neighbours of words, a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; opens no window

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE


def progress_bar(console: Console) -> Progress:
    """Its task has the fields `loss` and `speed`, in words a second."""
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} words/s"),
        TimeRemainingColumn(),
        console=console,
    )


def nearest_neighbours(
    words: list[str], vectors: np.ndarray, queries: Sequence[str]
) -> Table:
    """Returns a table of the words whose vectors point most nearly the same way."""
    unit = normalised(vectors)
    table = Table("word", "nearest first", title="Nearest neighbours")
    for query in queries:
        rows = nearest(unit, words.index(query))
        table.add_row(query, ", ".join(words[row] for row in rows))
    return table


def draw(
    path: Path,
    losses: np.ndarray,
    words: list[str],
    vectors: np.ndarray,
    queries: Sequence[str],
) -> None:
    """Writes a picture: the loss curve, and a map of common words."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(16, 9), width_ratios=(1, 4), layout="constrained"
    )
    draw_losses(left, losses)
    draw_map(figure, right, words, vectors, queries)
    figure.savefig(path, dpi=125)
    plt.close(figure)


def draw_losses(axes: Axes, losses: np.ndarray) -> None:
    """Draws about a hundred points, each the mean of as many steps as that takes."""
    smoothed = max(1, len(losses) // 100)
    points = losses[: len(losses) // smoothed * smoothed].reshape(-1, smoothed)
    axes.plot(np.arange(len(points)) * smoothed + smoothed / 2, points.mean(1))
    axes.set(title="Loss", xlabel="step", ylabel="loss of a pair")
    axes.grid(alpha=0.3)


def draw_map(
    figure: Figure,
    axes: Axes,
    words: list[str],
    vectors: np.ndarray,
    queries: Sequence[str],
) -> None:
    """Places words with similar vectors near each other, coloured by cluster."""
    unit = normalised(vectors)
    shown = words_on_map(words, unit, queries)
    words, unit = [words[i] for i in shown], unit[shown]
    perplexity = min(12, len(words) / 4)
    place = TSNE(
        metric="cosine",
        init="pca",
        perplexity=perplexity,
        method="exact",  # the default is slower for so few words
        max_iter=500,
        random_state=0,
    )
    cluster = KMeans(min(10, len(words)), random_state=0)
    xy = place.fit_transform(unit)
    colours = plt.get_cmap("tab10")(cluster.fit_predict(unit))
    bold = [word in queries for word in words]

    axes.scatter(*xy.T, s=6, c=colours)
    axes.set(title="Common words, and the words asked for (bold)", xticks=[], yticks=[])
    axes.margins(0.06)
    figure.draw_without_rendering()  # fixes the scale, so that labels have a size
    figure.set_layout_engine("none")
    taken: list[Bbox] = []
    for i in sorted(range(len(words)), key=lambda i: not bold[i]):
        write_label(axes, words[i], (xy[i, 0], xy[i, 1]), colours[i], bold[i], taken)


def words_on_map(
    words: list[str], unit: np.ndarray, queries: Sequence[str], common: int = 250
) -> list[int]:
    """Returns the rows of common words, of the queries, and of their neighbours."""
    long = [row for row, word in enumerate(words) if len(word) > 2]
    shown = (long or list(range(len(words))))[:common]
    for query in queries:
        row = words.index(query)
        shown += [row, *nearest(unit, row)]
    return list(dict.fromkeys(shown))


def write_label(
    axes: Axes,
    word: str,
    point: tuple[float, float],
    colour: np.ndarray,
    bold: bool,
    taken: list[Bbox],
) -> None:
    """Writes a word where no other stands, near its point, or else not at all."""
    sides = (
        {"xytext": (0, 3), "ha": "center", "va": "bottom"},
        {"xytext": (0, -3), "ha": "center", "va": "top"},
        {"xytext": (4, 0), "ha": "left", "va": "center"},
        {"xytext": (-4, 0), "ha": "right", "va": "center"},
        {"xytext": (0, 13), "ha": "center", "va": "bottom"},
        {"xytext": (0, -13), "ha": "center", "va": "top"},
    )
    for side in sides:
        label = axes.annotate(
            word,
            point,
            textcoords="offset points",
            color=colour,
            weight="bold" if bold else "normal",
            fontsize=10 if bold else 9,
            **side,
        )
        box = label.get_window_extent()
        if not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return
        label.remove()


def nearest(unit: np.ndarray, row: int, count: int = 6) -> np.ndarray:
    """Returns the rows at the smallest angles to a row, without itself."""
    order = np.argsort(-(unit @ unit[row]), kind="stable")
    return order[order != row][:count]


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Returns the vectors at length 1, so that a product of two is their cosine."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
