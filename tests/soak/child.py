"""The two-tower example, which puts down where it is: notes, all or some, its options.

"all" keeps each checkpoint.
"""

import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_two_tower as example


def main(notes: Path, keep: str, options: list[str]) -> None:
    """Runs the example, and adds a line to the notes before steps are made."""
    train_steps = example.train_steps

    def noted(model: Any, data: Any, steps: Any, **how: Any) -> Any:
        with notes.open("a") as file:
            file.write(f"{steps[0]}\n")
        return train_steps(model, data, steps, **how)

    example.train_steps = noted
    if keep == "all":
        example.open_checkpoints = lambda folder, *_: ocp.CheckpointManager(
            folder.absolute() / "checkpoints-all"
        )
    example.main(options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
