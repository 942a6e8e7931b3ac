"""Who chose what, in which order: read from a file, or made up; and training examples.

The made-up shop has users with a taste for few categories, who stay in a category for a
while, and items that are often followed by the next of their series. So both the user
and the history tell what comes next.
"""

import csv
import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from devices import on_each
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Events, by user and then by time.

    Attributes:
        users: int32 `[E]`, ascending: who.
        items: int32 `[E]`: what.
        categories: int32 `[I]`: of each item.
        num_users: U; users are in `[0, U)`.
    """

    users: np.ndarray
    items: np.ndarray
    categories: np.ndarray
    num_users: int

    @property
    def num_items(self) -> int:
        return len(self.categories)

    @property
    def num_categories(self) -> int:
        return int(self.categories.max()) + 1

    def fingerprint(self) -> str:
        arrays = (self.users, self.items, self.categories)
        return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()


@dataclasses.dataclass(frozen=True)
class Examples:
    """What was chosen next, after which history.

    Attributes:
        users: int32 `[N]`.
        history: int32 `[N, H]`: the last items of the user before, the latest first;
            -1 where there are fewer.
        items: int32 `[N]`: the choice.
    """

    users: np.ndarray
    history: np.ndarray
    items: np.ndarray


class Device(NamedTuple):
    """Examples on the device: what training steps draw from."""

    users: jax.Array
    history: jax.Array
    items: jax.Array
    categories: jax.Array  # [I]
    log_popularity: jax.Array  # [I]


def make_interactions(
    num_users: int, num_items: int, num_categories: int, seed: int
) -> Interactions:
    """Makes up 20 events of each user."""
    rng = np.random.default_rng(seed)
    shape = (num_users, 20)
    categories = np.arange(num_items, dtype=np.int32) % num_categories
    size = num_items // num_categories  # items of a category, the popular ones first

    favourites = rng.integers(0, num_categories, (num_users, 3))
    picked = favourites[np.arange(num_users)[:, None], rng.integers(0, 3, shape)]
    rank = np.minimum(rng.zipf(1.4, shape) - 1, size - 1)
    items = picked + rank * num_categories
    mood = rng.random(shape)
    for t in range(1, shape[1]):
        before = items[:, t - 1]
        stays = before % num_categories + rank[:, t] * num_categories
        follows = before + num_categories
        follows = np.where(follows < size * num_categories, follows, before)
        items[:, t] = np.select(
            [mood[:, t] < 0.35, mood[:, t] < 0.6], [follows, stays], items[:, t]
        )
    users = np.repeat(np.arange(num_users, dtype=np.int32), shape[1])
    items = items.reshape(-1).astype(np.int32)
    return Interactions(users, items, categories, num_users)


def read_interactions(path: Path) -> Interactions:
    """Reads a CSV file with the columns `user` and `item`, its rows in order of time.

    A column `category` is that of the item; without it all have one.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not rows or not {"user", "item"} <= set(rows[0]):
        raise ValueError(f"{path} must have a header with `user` and `item`, and rows")
    for number, row in enumerate(rows, start=1):
        if not row["user"] or not row["item"]:
            raise ValueError(
                f"{path}: row {number} below the header lacks user or item"
            )

    def numbered(column: str) -> tuple[np.ndarray, int]:
        names, numbers = np.unique(
            [row.get(column) or "" for row in rows], return_inverse=True
        )
        return numbers.astype(np.int32), len(names)

    users, num_users = numbered("user")
    items, num_items = numbered("item")
    categories = np.zeros(num_items, np.int32)
    categories[items] = numbered("category")[0]
    order = np.argsort(users, kind="stable")
    return Interactions(users[order], items[order], categories, num_users)


def split(data: Interactions, length: int) -> tuple[Examples, Examples]:
    """Returns the examples to train on, and the last event of each user to test on."""
    event = np.arange(len(data.users))
    first = np.searchsorted(data.users, data.users)  # event of the same user
    back = event[:, None] - 1 - np.arange(length)
    before = data.items[np.maximum(back, 0)]
    history = np.where(back >= first[:, None], before, -1).astype(np.int32)
    is_last = np.append(data.users[1:] != data.users[:-1], True)

    def examples(which: np.ndarray) -> Examples:
        return Examples(data.users[which], history[which], data.items[which])

    return examples(~is_last), examples(is_last & (event > first))


def put_on_device(
    examples: Examples, data: Interactions, mesh: Mesh | None = None
) -> Device:
    """Puts examples on each device, with what is known of the items they choose."""
    counts = np.bincount(examples.items, minlength=data.num_items)
    log_popularity = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)
    arrays = (examples.users, examples.history, examples.items)
    return Device(*on_each((*arrays, data.categories, log_popularity), mesh))


def recall_of_popular(train: Examples, test: Examples, num_items: int) -> float:
    """Returns the recall of always recommending the ten most popular items."""
    counts = np.bincount(train.items, minlength=num_items)
    return float(np.isin(test.items, np.argsort(-counts)[:10]).mean())
