"""Chunks of occurrences: which groups each of them fetches and writes back."""

from typing import Any

import hypothesis
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
)
def test_each_group_is_moved_in_and_out_once(ids, rows_per_group, size, accumulate):
    ids = np.sort(np.int32(ids))
    case = Case("", V, 128, 4, options={"use_gradient_accumulation": accumulate})
    problem = helpers.spec(case, cases.arrays(case))
    dim = 128 // rows_per_group if rows_per_group > 1 else 128
    problem = helpers.changed(problem, packed=True, dim=dim)
    assert problem.layout.rows_per_group == rows_per_group
    none: Any = None  # no gradient is looked at
    batch = SortedBatch(none, jnp.asarray(ids), jnp.arange(ids.size), None)
    chunks = split_into_chunks(batch, problem, size)
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
    # In place from before its first occurrence is stepped until after its last.
    last_of = {group: int(np.flatnonzero(own == group)[-1]) // size for group in own}
    first_of = {group: int(np.flatnonzero(own == group)[0]) // size for group in own}
    assert written == last_of
    assert fetched == (last_of if accumulate else first_of)
    assert chunks.active[0] == -(-own.size // size)
