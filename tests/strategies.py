"""Hypothesis strategies. Sizes come from short lists: a new size is a new compile."""

import dataclasses
import itertools

from hypothesis import strategies as st

from tests import cases
from tests.cases import Case
from tests.ways import Way

# V, D, N: a batch larger than the table, one id, odd widths.
SIZES = ((7, 16, 24), (40, 3, 1), (40, 8, 7))
OPTIONS = tuple(
    (case.options, case.weighted)
    for case in cases.CASES
    if case.options or case.weighted or case.name == "default"
)
DTYPES = (cases.FLOAT32, cases.BFLOAT16, cases.MIXED)
SEEDS = st.integers(0, 2**32 - 1)


def supported_cases(way: Way) -> st.SearchStrategy[Case]:
    """Cases that an implementation says it can do, with any distribution of ids.

    They are those of `cases.CASES` and, where D is free, every option at other sizes
    and dtypes.
    """
    drawn = [
        Case("drawn", *size, "uniform", dtypes, weighted, options=options)
        for size, dtypes, (options, weighted) in itertools.product(
            SIZES, DTYPES, OPTIONS
        )
    ]
    supported = [case for case in (*cases.CASES, *drawn) if way.supports(case)]

    def with_ids(case: Case, distribution: str) -> Case:
        return dataclasses.replace(case, distribution=distribution)

    return st.builds(
        with_ids, st.sampled_from(supported), st.sampled_from(cases.DISTRIBUTIONS)
    )
