"""The figures of the docs are drawn from the committed results."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from PIL import Image

from benchmarks import figures
from benchmarks.report import FIGURES
from benchmarks.results import COMMITTED


def test_every_figure_can_be_drawn(tmp_path):
    drawn = figures.draw_all(COMMITTED, tmp_path)
    assert [path.stem for path in drawn] == list(figures.FIGURES)
    for path in drawn:
        with Image.open(path) as image:
            width, height = image.size
            assert width > 800 and height > 400, path


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_is_up_to_date(name):
    source, _ = figures.FIGURES[name]
    with Image.open(FIGURES / f"{name}.png") as image:
        drawn_from = image.info["Source"]
    wanted = figures.digest(COMMITTED / source)
    assert drawn_from == wanted, "run `python -m benchmarks report`"


def test_a_folder_without_results_has_no_figures(tmp_path):
    assert figures.draw_all(tmp_path, tmp_path) == []


def test_every_figure_has_a_caption():
    assert figures.CAPTIONS.keys() == figures.FIGURES.keys()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.4, 0.52, 0.52, 0.52], [0.34, 0.44, 0.54, 0.64]),
        ([0.5], [0.5]),
        ([], []),
    ],
)
def test_names_move_apart_as_little_as_they_must(wanted, found):
    assert figures.spread_apart(wanted, 0.1) == pytest.approx(found)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_names_never_overlap_and_keep_their_order(wanted):
    found = figures.spread_apart(sorted(wanted), 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(found))
    assert sum(found) == pytest.approx(sum(wanted))


def test_each_name_stands_at_the_end_of_its_line():
    figure = figures.cost_figure("N", COMMITTED / "scale.json")
    assert figure is not None
    (axes,) = figure.axes
    ends = {np.asarray(line.get_ydata())[-1] for line in axes.lines}
    named = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(named) == len(axes.lines) > 3
    assert {text.xy[1] for text in named} == ends
    FigureCanvasAgg(figure).draw()
    boxes = sorted((Text.get_window_extent(text) for text in named), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_bars_are_labelled_with_their_numbers():
    figure = figures.least_time_figure(COMMITTED / "static.json")
    assert figure is not None
    shown = {
        axes.get_title(): [t.get_text() for t in axes.texts] for axes in figure.axes
    }
    assert list(shown) == ["v4", "v5e", "v5p", "v6e", "7x"]
    assert shown["v6e"][0] == "2.19" and " -" in shown["v4"]
    figure = figures.times_figure(COMMITTED / "update.json")
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["zipf ids", "uniform ids"]
    assert all(t.get_text().endswith(" ms") for axes in figure.axes for t in axes.texts)
