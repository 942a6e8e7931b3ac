"""Random cases of `sparse_adam.check`, for hours: `python -m tests.campaign`."""
