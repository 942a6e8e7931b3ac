"""Trains the same two towers in the framework that you name.

    python examples/layers/train.py nnx     # or plain, linen, equinox, keras

The losses of all of them are the same.
"""

import importlib
import os
import sys

FRAMEWORKS = ("plain", "nnx", "linen", "equinox", "keras")


def main() -> None:
    """Prints the loss of each step."""
    if len(sys.argv) != 2 or sys.argv[1] not in FRAMEWORKS:
        sys.exit(f"name one of {', '.join(FRAMEWORKS)}")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    losses = importlib.import_module(f"two_tower_{sys.argv[1]}").train()
    for step, loss in enumerate(losses, 1):
        print(f"step {step:2}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
