"""What is printed of rows fits 80 columns, and tells what was left out."""

from dataclasses import replace

import pytest

from benchmarks import lines
from benchmarks.contenders import CONTENDERS
from benchmarks.options import WIDTH, wrapped
from tests.benchmarks import fakes

TIMED = replace(
    fakes.ROW,
    ms=(1.0,),
    p20_ms=1.25,
    p50_ms=12.345,
    p80_ms=98765.4,
    compile_s=1.234,
    gb_per_s=1234.5,
    share_of_copy=1.23,
    ratio=1.0,
)
LONG = max((each.title for each in CONTENDERS.values()), key=len)


def skipped(impl, reason="torch is not installed", case="small"):
    return replace(
        fakes.ROW, impl=impl, title=impl, status="skipped", reason=reason, case=case
    )


def widths(*texts):
    return [len(line) for text in texts for line in text.plain.splitlines()]


def test_columns_are_aligned_in_80_columns():
    head, row = lines.header().plain, lines.line(replace(TIMED, title=LONG)).plain
    assert len(row) <= WIDTH == 80 and len(head) <= WIDTH
    for name, cell in (("ms", "12.3"), ("p80", "98765"), ("of copy", "123%")):
        assert head.index(name) + len(name) == row.index(cell) + len(cell)
    assert row.endswith("1.00") and head.endswith("x ours")


def test_everything_else_fits_80_columns():
    failed = replace(fakes.ROW, status="failed", reason="ValueError: no " * 20)
    case = replace(fakes.ROW, rows=10**9, dtypes=("float32", "bfloat16") * 2)
    predicted = replace(TIMED, predicted_ms=9.87)
    rows = [skipped(name) for name in CONTENDERS]
    texts = (
        *(lines.case_line(case), lines.line(failed), lines.line(predicted)),
        *(lines.skipped_line(rows), lines.skipped_reasons(rows)),
    )
    assert max(widths(*texts)) <= WIDTH
    assert lines.line(predicted).plain.endswith(
        "at least 9.87 ms by its compiled program"
    )
    assert "V = 1,000,000,000" in lines.case_line(case).plain


def test_the_skipped_take_one_line_together():
    few = lines.skipped_line([TIMED, skipped("torch"), skipped("keras")])
    assert few is not None and few.plain == "skipped: torch, keras"
    many = lines.skipped_line([skipped(name) for name in CONTENDERS])
    assert many is not None and len(widths(many)) == 1
    shown = many.plain.count(",")
    assert many.plain.endswith(f", {len(CONTENDERS) - shown} more")
    assert lines.skipped_line([TIMED]) is None


def test_reasons_are_given_once_with_the_cases_that_they_are_of():
    rows = [
        *(skipped("torch"), skipped("keras", "keras is not installed"), TIMED),
        *(skipped("torch", case="other"), skipped("at_set", "no bfloat16", "other")),
        *(replace(TIMED, impl="at_set"), replace(TIMED, case="other")),
    ]
    text = lines.skipped_reasons(rows)
    assert text is not None
    assert text.plain.splitlines() == [
        "Skipped, and why:",
        "  torch: torch is not installed",
        "  keras: keras is not installed",
        "  at_set in other: no bfloat16",
        "  pip install '.[peers]' installs those that are not installed",
    ]
    assert lines.skipped_reasons([TIMED]) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123, "0.12"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"), (1234, "1234")],
)
def test_numbers_have_three_digits(value, shown):
    assert lines.number(value) == shown


def test_text_is_wrapped_with_an_indent():
    first, second = wrapped("word " * 20).splitlines()
    assert len(first) <= WIDTH and second.startswith("    word")
