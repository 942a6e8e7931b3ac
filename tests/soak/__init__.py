"""Training that is killed again and again: `python -m tests.soak`."""
