"""Checks an installation: every implementation here against the NumPy reference.

`python -m sparse_adam.check` runs small cases, then times, and writes a report to send
along with an issue. It needs what the package needs, jax and numpy. What the lines of
the report mean is in docs/check.md.

Files, in the order of a run: `case.py` says what a case is, `cases.py` lists those to
run, `batches.py` draws the numbers, `run.py` runs a case, `compare.py` holds it
against the reference, `shrink.py` finds a smaller case that fails and what avoids it,
`times.py` times updates beside their static bounds, `report.py` writes what was found.
"""
