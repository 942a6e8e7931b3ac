"""Checkpoints of one run: another run, with other settings or data, has others."""

import hashlib
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from sparse_adam.checkpoint import Latest, restore_latest


def open_checkpoints(
    folder: Path, settings: Any, fingerprint: str
) -> ocp.CheckpointManager:
    """Opens those of the run with these settings, on data with this fingerprint.

    What a killed run had begun to write is deleted.
    """
    run = hashlib.sha256(f"{settings} {fingerprint}".encode()).hexdigest()[:12]
    return ocp.CheckpointManager(
        folder.absolute() / f"checkpoints-{run}",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True
        ),
    )


def go_on_from(
    checkpoints: ocp.CheckpointManager, args: ocp.args.CheckpointArgs
) -> Latest | None:
    """Restores the last one that can be read, and deletes those that cannot."""
    found = restore_latest(checkpoints, args)
    for step in found.unreadable if found else ():
        checkpoints.delete(step)
    return found
