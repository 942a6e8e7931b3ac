"""What a compiled step does with arrays of the size of a table."""

import re
from collections import Counter

# These hand an array on, or write rows into it in place.
IN_PLACE = {
    "bitcast",
    "call",
    "conditional",
    "custom-call",  # a kernel; what it can not alias is copied before it
    "dynamic-update-slice",
    "fusion",  # what is in it is listed too
    "get-tuple-element",
    "parameter",
    "scatter",
    "tuple",
    "while",
}


def dense_work(text: str, num_rows: int) -> set[str]:
    """Returns the instructions that make an array of `num_rows` rows, or copy one."""
    made = re.findall(rf"= \w+\[{num_rows}(?:,\d+)*\](?:{{[^}}]*}})? ([\w-]+)\(", text)
    return set(made) - IN_PLACE


def counts(text: str, *operations: str) -> Counter[str]:
    """Returns how often a program has each of these operations."""
    found = re.findall(r"= .*? ([a-z-]+)\(", text)
    return Counter(name for name in found if name in operations)
