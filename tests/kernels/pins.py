"""Counts of compiled programs that are pinned: how far they may be off."""

from collections.abc import Iterable

SLACK = 1.03  # another order of equal instructions moves a count by less


def assert_no_more(
    found: Iterable[float], pinned: Iterable[float], name: object
) -> None:
    """Asserts that no count is more than 3 % above its pin; fewer are welcome."""
    found, pinned = tuple(found), tuple(pinned)
    pairs = zip(found, pinned, strict=True)
    assert all(x <= SLACK * pin + 0.01 for x, pin in pairs), (
        f"{name}: {found} bundles, pinned are {pinned}"
    )
