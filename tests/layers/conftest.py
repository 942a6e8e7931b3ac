"""What the tests of all layers need."""

import importlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from tests.layers.models import FOLDER


@pytest.fixture(autouse=True)
def frameworks_promote() -> Iterator[None]:
    """Lifts what tests/conftest.py forbids and the frameworks' own code does."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(f"two_tower_{name}")
