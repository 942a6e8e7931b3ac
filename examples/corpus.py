"""Text as numbers: read files, number their words, draw batches from them."""

import collections
import dataclasses
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PADDING = -1  # an id that stands for no word

# Folders of the standard library that hold tests and tables rather than text.
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings"}

# `max_line_length` is three words and `ValueError` is one.
WORD = re.compile(r"[^\W\d_]{2,}")  # two letters or more, of any alphabet
CAMEL_CASE = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text whose words are numbered from the most common to the rarest.

    Attributes:
        text: int32 `[T]`, the number of each word of the text, in order.
        words: V words, the one that each number stands for.
        counts: int64 `[V]`, how often each word occurs in the text.
    """

    text: np.ndarray
    words: list[str]
    counts: np.ndarray

    def fingerprint(self) -> str:
        """Returns a digest that two corpora share only if they are the same."""
        digest = hashlib.sha256(" ".join(self.words).encode())
        digest.update(self.text.tobytes())
        return digest.hexdigest()


class Text(NamedTuple):
    """A corpus on the device."""

    words: jax.Array  # int32 [T], the text
    keep: jax.Array  # float32 [V], the chance that an occurrence of a word is kept
    noise: jax.Array  # float32 [V], the chance of a word as a negative


class Batch(NamedTuple):
    """What one step of training looks at: B passages of L words, K negatives."""

    passages: jax.Array  # int32 [B, L], with PADDING at the end of a short one
    pairs: jax.Array  # bool [B, L, L]: is word j in the window of word i?
    negatives: jax.Array  # int32 [K]


def read_corpus(path: Path | None, min_count: int) -> Corpus:
    """Reads a file, a folder, or (None) the standard library's own source.

    Words that occur fewer than `min_count` times are left out of the text.
    """
    spoken = [word for file in find_files(path) for word in split_words(file)]
    counted = collections.Counter(spoken).most_common()
    common = {word: count for word, count in counted if count >= min_count}
    number = {word: i for i, word in enumerate(common)}
    text = np.array([number[word] for word in spoken if word in number], np.int32)
    return Corpus(text, list(common), np.array(list(common.values()), np.int64))


def find_files(path: Path | None) -> list[Path]:
    """Returns the files to read, in an order that is the same on every run."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return sorted(
            file
            for file in library.rglob("*.py")
            if SKIPPED.isdisjoint(file.relative_to(library).parts)
        )
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        return sorted(file for file in files if not is_hidden(file.relative_to(path)))
    return [path]


def is_hidden(path: Path) -> bool:
    """Is the file, or a folder on its path, one whose name begins with a dot?"""
    return any(part.startswith(".") for part in path.parts)


def split_words(file: Path) -> Iterator[str]:
    """Yields the words of a file, in lower case unless they are CamelCase."""
    for word in WORD.findall(file.read_text("utf-8", errors="replace")):
        yield word if CAMEL_CASE.search(word) else word.lower()


def put_on_device(corpus: Corpus, subsampling: float) -> Text:
    """Words more frequent than `subsampling` will be thinned out; negatives follow
    the frequencies to the power 3/4, as in the paper."""
    frequency = corpus.counts / corpus.counts.sum()
    keep = np.minimum(1, np.sqrt(subsampling / frequency))
    noise = frequency**0.75
    return Text(
        jnp.asarray(corpus.text),
        jnp.asarray(keep, jnp.float32),
        jnp.asarray(noise / noise.sum(), jnp.float32),
    )


def draw_batch(
    text: Text, key: jax.Array, shape: tuple[int, int], window: int, num_negatives: int
) -> Batch:
    """Draws passages from anywhere in the text, windows for their words, negatives.

    Negatives are shared by the whole batch, so that a step looks up few rows.
    """
    for_passages, for_window, for_negatives = jax.random.split(key, 3)
    passages = draw_passages(text, for_passages, *shape)

    # Each word's window has its own width, so that nearer words count more.
    width = jax.random.randint(for_window, passages.shape, 1, window + 1)
    position = jnp.arange(passages.shape[1])
    distance = jnp.abs(position[:, None] - position)
    is_word = passages != PADDING
    pairs = (distance > 0) & (distance <= width[:, :, None])
    pairs &= is_word[:, :, None] & is_word[:, None, :]

    vocabulary = jnp.arange(text.noise.size, dtype=jnp.int32)
    negatives = jax.random.choice(
        for_negatives, vocabulary, (num_negatives,), p=text.noise
    )
    return Batch(passages, pairs, negatives)


def draw_passages(text: Text, key: jax.Array, count: int, length: int) -> jax.Array:
    """Reads passages of twice the length and drops frequent words at random."""
    for_start, for_keep = jax.random.split(key)
    last = text.words.size - 2 * length
    start = jax.random.randint(for_start, (count, 1), 0, last + 1)
    words = text.words[start + jnp.arange(2 * length)]

    kept = jax.random.uniform(for_keep, words.shape) < text.keep[words]
    words = jnp.where(kept, words, PADDING)
    kept_first = jnp.argsort(~kept, axis=1, stable=True)
    return jnp.take_along_axis(words, kept_first, axis=1)[:, :length]
