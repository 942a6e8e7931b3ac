"""TPUs that are not there, to compile for."""

import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

AXIS = "chip"


def four_chips(monkeypatch: pytest.MonkeyPatch, name: str, kind: AxisType) -> Mesh:
    """A mesh of the four devices of a topology, such as "v6e:2x2"."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setenv(variable, os.environ.get(variable, value))
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    return Mesh(np.array(devices[:4]), (AXIS,), axis_types=(kind,))
