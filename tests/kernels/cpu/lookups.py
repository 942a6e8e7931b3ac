"""Batches that the C++ lookup is tested with, and what it must make of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.cpu import lookup
from sparse_adam.kernels.layout import PackedLayout
from tests.kernels import stored

BFLOAT16 = jnp.bfloat16
FORMS = ("padded", "ascending", "mixed")  # how samples are told
WILD = (-1, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A table, and a batch of samples that look it up."""

    num_rows: int = 50
    dim: int = 16
    num_samples: int = 30
    places: int = 5  # ids a sample, on average
    dtypes: tuple[str, ...] = ("float32", "float32", "float32")
    packed: bool = False
    form: str = "padded"
    weighted: bool = False
    scaled: bool = False
    narrow: bool = False  # the result has the table's dtype
    seed: int = 0

    @property
    def layout(self) -> PackedLayout | None:
        """The layout of packed lines."""
        if not self.packed:
            return None
        return PackedLayout(self.num_rows, self.dim, tuple(map(np.dtype, self.dtypes)))

    @property
    def result_dtype(self) -> str:
        """The dtype of what is looked up."""
        return self.dtypes[0] if self.narrow else "float32"


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of a case."""

    state: tuple[np.ndarray, ...]
    ids: np.ndarray
    samples: np.ndarray | None
    gains: np.ndarray | None
    scales: np.ndarray | None

    def stored(self, case: Case) -> np.ndarray:
        """The table as the kernel is given it."""
        if case.packed:
            return stored.pack(self.state).view(np.int32)
        return self.state[0]


def draw(case: Case) -> Batch:
    """Ids some of which are wild, samples some of which are empty."""
    rng = np.random.default_rng(case.seed)
    shape = case.num_rows, case.dim
    state = tuple(rng.standard_normal(shape).astype(d) for d in case.dtypes)
    num_ids = case.num_samples * case.places
    ids = rng.integers(0, case.num_rows, num_ids).astype(np.int32)
    bad = rng.random(num_ids) < 0.2
    ids[bad] = rng.choice([*WILD, case.num_rows], bad.sum())
    ids[case.places : 3 * case.places] = -1  # the second and the third are empty
    samples = None
    if case.form != "padded":
        samples = rng.integers(0, max(case.num_samples, 1), num_ids)
        if num_ids:  # some have no sample
            gone = rng.random(num_ids) < 0.1
            samples[gone] = rng.choice([-1, -(2**31), case.num_samples, 2**31 - 1])
        samples = samples.astype(np.int32)
        if case.form == "ascending":
            samples = np.sort(samples.view(np.uint32)).view(np.int32)
    gains = rng.standard_normal(num_ids).astype(np.float32)
    scales = rng.standard_normal(case.num_samples).astype(np.float32)
    return Batch(
        state,
        ids,
        samples,
        gains if case.weighted else None,
        scales if case.scaled else None,
    )


def expected(case: Case, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The combined rows in float64, and a bound of the sum of magnitudes."""
    table = batch.state[0].astype(np.float64)
    samples = batch.samples
    if samples is None:
        samples = np.repeat(np.arange(case.num_samples), case.places)
    here = (batch.ids >= 0) & (batch.ids < case.num_rows)
    here &= (samples >= 0) & (samples < case.num_samples)
    rows = table[batch.ids[here]]
    if batch.gains is not None:
        rows = batch.gains[here].astype(np.float64)[:, None] * rows
    sums, sizes = np.zeros((2, case.num_samples, case.dim))
    np.add.at(sums, samples[here], rows)
    np.add.at(sizes, samples[here], np.abs(rows))
    if batch.scales is not None:
        sums = batch.scales.astype(np.float64)[:, None] * sums
        sizes = np.abs(batch.scales.astype(np.float64))[:, None] * sizes
    return sums, sizes


def assert_right(case: Case, batch: Batch, found: np.ndarray) -> None:
    """Compares combined rows: within some roundings, and zeros where all are."""
    sums, sizes = expected(case, batch)
    found = found.astype(np.float64)
    bound = (2.0**-8 if case.result_dtype != "float32" else 0) * np.abs(sums)
    count = max(np.size(batch.ids), 1)
    bound += min(count, 64) * 2.0**-23 * sizes
    assert found.shape == sums.shape
    assert (np.abs(found - sums) <= bound).all()
    assert not found[(sizes == 0).all(1)].any()


def combined(case: Case, batch: Batch) -> np.ndarray:
    """The result under JAX."""
    given = [batch.stored(case), batch.ids, batch.samples, batch.gains, batch.scales]

    @jax.jit
    def run(
        table: jax.Array,
        ids: jax.Array,
        samples: jax.Array | None,
        gains: jax.Array | None,
        scales: jax.Array | None,
    ) -> jax.Array:
        return lookup.combine_rows(
            table,
            ids,
            num_samples=case.num_samples,
            samples=samples,
            gains=gains,
            scales=scales,
            layout=case.layout,
            dtype=case.result_dtype,
        )

    return np.asarray(run(*(None if x is None else jnp.asarray(x) for x in given)))


def looked_up(case: Case, batch: Batch) -> np.ndarray:
    """Single rows under JAX."""
    run = functools.partial(
        lookup.lookup_rows, layout=case.layout, dtype=case.result_dtype
    )
    return np.asarray(jax.jit(run)(batch.stored(case), jnp.asarray(batch.ids)))


def rows_of(case: Case, batch: Batch) -> np.ndarray:
    """Single rows by NumPy."""
    here = (batch.ids >= 0) & (batch.ids < case.num_rows)
    rows = batch.state[0][np.where(here, batch.ids, 0)].astype(case.result_dtype)
    return np.where(here[:, None], rows, np.zeros((), rows.dtype))


ENCODINGS = tuple(
    Case(dim=dim, dtypes=dtypes, packed=packed, narrow=narrow, weighted=True)
    for dim in (1, 3, 17, 32, 100, 128, 300)
    for packed, dtypes in (
        (False, ("float32", "float32", "float32")),
        (False, ("bfloat16", "float32", "float32")),
        (True, ("float32", "float32", "float32")),
        (True, ("bfloat16", "float32", "float32")),  # as float32
        (True, ("bfloat16", "bfloat16", "float32")),  # in low halves
        (True, ("bfloat16", "bfloat16", "bfloat16")),
    )
    for narrow in {False, dtypes[0] == "bfloat16"}
)
BATCHES = tuple(
    Case(form=form, weighted=weighted, scaled=scaled)
    for form in FORMS
    for weighted in (False, True)
    for scaled in (False, True)
) + tuple(
    dataclasses.replace(case, form=form, weighted=True, scaled=True)
    for form in FORMS
    for case in (
        Case(num_samples=0),
        Case(places=0),
        Case(num_samples=1, places=1, num_rows=1),
        Case(num_samples=700, places=1),
        Case(num_samples=4, places=2000),  # more than a window holds
        Case(num_samples=4, places=2000, dtypes=("bfloat16",) * 3, narrow=True),
        Case(num_samples=2000, places=0),
        Case(num_samples=2000, places=3),  # some wait for the next window
        Case(num_samples=2000, places=3, dtypes=("bfloat16",) * 3, narrow=True),
        Case(num_samples=300, places=40, num_rows=9000, dim=33),  # for several threads
        Case(num_samples=300, places=40, num_rows=900, dim=40, packed=True),
    )
)
