"""The figures of the docs are drawn from the committed results."""

import pytest
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
