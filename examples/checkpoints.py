"""Checkpoints of one run: another run, with other settings or data, has others."""

import hashlib
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


def open_checkpoints(
    folder: Path, settings: Any, fingerprint: str
) -> ocp.CheckpointManager:
    """Opens those of the run with these settings, on data with this fingerprint."""
    run = hashlib.sha256(f"{settings} {fingerprint}".encode()).hexdigest()[:12]
    return ocp.CheckpointManager(
        folder.absolute() / f"checkpoints-{run}",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        ),
    )
