"""The devices that an example trains on: of this process, or of several at once."""

from collections.abc import Callable
from typing import Any

import click
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def device_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that `mesh_of` takes to a command."""
    options = (
        click.option(
            "--devices",
            type=click.IntRange(1),
            help="How many devices of each process share tables and batches.  "
            "[default: one; of several processes, all]",
        ),
        click.option(
            "--distributed",
            is_flag=True,
            help="This is one of several processes, as the environment tells JAX: a "
            "TPU pod does, and so do Slurm, Open MPI and Kubernetes.",
        ),
        click.option(
            "--coordinator", help="HOST:PORT of process 0, where nothing tells it."
        ),
        click.option("--processes", type=click.IntRange(1), help="How many there are."),
        click.option("--process-id", type=click.IntRange(0), help="Which one this is."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def mesh_of(
    devices: int | None,
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
) -> Mesh | None:
    """Returns the mesh to train on; None for one device. Call it before all of JAX.

    Raises:
        ClickException: some of the options for a coordinator are missing, or a process
            has too few devices.
    """
    told = (coordinator, processes, process_id)
    if any(x is not None for x in told):
        if any(x is None for x in told):
            raise click.ClickException(
                "--coordinator, --processes and --process-id go together"
            )
        distributed = True
    if devices is None and not distributed:
        return None
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)  # read where JAX has a CPU
    if distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process_id)
    if devices is not None and jax.local_device_count() < devices:
        raise click.ClickException(
            f"--devices {devices}, but this process has {jax.local_device_count()}"
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process)[:devices]
    ]
    kinds = (AxisType.Auto,)
    return jax.make_mesh((len(chosen),), ("data",), axis_types=kinds, devices=chosen)


def on_each(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays that all processes have alike on every device of the mesh."""
    if mesh is None:
        return jax.device_put(tree)
    place: Any = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(jax.tree.map(np.asarray, tree), place)
