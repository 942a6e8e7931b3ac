"""Chunks of occurrences: which groups each of them fetches and writes back."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from sparse_adam.kernels.spec import SortedBatch
from sparse_adam.kernels.tensorcore.chunks import moved, split_into_chunks
from tests import cases, helpers
from tests.cases import Case

V = 20


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.integers(0, V), min_size=1, max_size=60),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([8, 16]),
    st.booleans(),
    st.sampled_from([1, 2]),
)
@hypothesis.example([1] * 20, 1, 8, False, 1)
def test_each_group_is_moved_in_and_out_once(
    ids, rows_per_group, size, accumulate, cores
):
    ids = np.sort(np.int32(ids))
    case = Case("", V, 128, 4, options={"use_gradient_accumulation": accumulate})
    problem = helpers.spec(case, cases.arrays(case))
    dim = 128 // rows_per_group if rows_per_group > 1 else 128
    problem = helpers.changed(problem, packed=True, dim=dim)
    assert problem.layout.rows_per_group == rows_per_group
    none: Any = None  # no gradient is looked at
    batch = SortedBatch(none, jnp.asarray(ids), jnp.arange(ids.size), None)
    chunks = split_into_chunks(batch, problem, size, cores)
    counts, continues, groups = map(
        np.asarray, (chunks.counts, chunks.continues, chunks.groups)
    )
    fetched, written = {}, {}
    for k in range(len(counts)):
        first, count, last = moved(counts, continues, k, accumulate)
        for group in groups[k, 0, first:count].tolist():
            assert group not in fetched
            fetched[group] = k
        for group in groups[k, 0, :last].tolist():
            assert group not in written
            written[group] = k
    own = ids[ids < V] // rows_per_group
    assert set(fetched) == set(written) == set(own.tolist())
    first, *cuts, end = np.asarray(chunks.bounds).tolist()
    assert first == 0
    if cores == 1:
        assert end == -(-own.size // size)
        place = np.arange(own.size)
    else:
        # Each core has whole runs: those that begin before the cut, or the others.
        (cut,) = cuts
        assert 0 <= cut <= end
        of_first = np.isin(own, [g for g, k in written.items() if k < cut])
        before = int(of_first.sum())
        assert of_first[:before].all() and cut == -(-before // size)
        assert end == cut + -(-(own.size - before) // size) or before == own.size
        place = np.arange(own.size) + np.where(of_first, 0, -before % size)
        starts = [0, *(np.flatnonzero(np.diff(own)) + 1), own.size]
        middle = own.size // 2
        nearest = min(abs(start - middle) for start in starts[:-1] or [0])
        assert not own.size or abs(before - middle) <= nearest
    # In place from before its first occurrence is stepped until after its last.
    last_of = {group: place[own == group][-1] // size for group in own}
    first_of = {group: place[own == group][0] // size for group in own}
    assert written == last_of
    assert fetched == (last_of if accumulate else first_of)


def test_chunks_are_the_same_however_many_are_sorted_at_once(monkeypatch):
    problem = helpers.spec(Case("", V, 128, 4), cases.arrays(Case("", V, 128, 4)))
    ids = np.sort(np.random.default_rng(0).integers(0, V + 1, 37).astype(np.int32))
    none: Any = None  # no gradient is looked at
    batch = SortedBatch(none, jnp.asarray(ids), jnp.arange(ids.size), None)
    at_once = split_into_chunks(batch, problem, size=8)
    monkeypatch.setattr("sparse_adam.kernels.tensorcore.chunks._SORTED_AT_ONCE", 2)
    in_turn = split_into_chunks(batch, problem, size=8)
    assert at_once.counts.size == 5
    jax.tree.map(np.testing.assert_array_equal, in_turn, at_once)
