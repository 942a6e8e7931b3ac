"""What a program costs on a TPU, read off its compiled form without a TPU."""

from benchmarks.static.compiler import StaticCase, count, count_all
from benchmarks.static.result import StaticReport

__all__ = ["StaticCase", "StaticReport", "count", "count_all"]
