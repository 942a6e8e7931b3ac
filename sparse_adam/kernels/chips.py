"""The TPU generations: what block sizes and choices of kernels depend on.

Bandwidth: Google Cloud's documentation of each generation, for one JAX device (half a
chip on 7x). Clock: from the published bfloat16 peak and the size of the matrix units;
v4's from Jouppi et al., "TPU v4" (ISCA 2023). Memories: `pltpu.get_tpu_info`.
"""

import dataclasses

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One JAX device of a generation."""

    name: str
    vmem_bytes: int
    hbm_gb_per_s: int
    clock_ghz: float  # of the TensorCore


_MIB = 2**20
CHIPS: dict[object, Chip] = {
    pltpu.ChipVersion.TPU_V4: Chip("v4", 16 * _MIB, 1228, 1.05),
    pltpu.ChipVersion.TPU_V5E: Chip("v5e", 128 * _MIB, 819, 1.5),
    pltpu.ChipVersion.TPU_V5P: Chip("v5p", 64 * _MIB, 2765, 1.75),
    pltpu.ChipVersion.TPU_V6E: Chip("v6e", 128 * _MIB, 1638, 1.75),
    pltpu.ChipVersion.TPU_7X: Chip("7x", 64 * _MIB, 3690, 2.2),
}
VMEM_BUDGET = 8 * _MIB  # of a row kernel: half of what v4, the smallest, has
# For a program that is traced for a TPU nobody has named: the least of each.
UNKNOWN = Chip("unknown", 16 * _MIB, 819, 1.05)


def in_scope() -> Chip:
    """The generation of the TPU in scope while tracing, or `UNKNOWN`.

    That is, as everywhere in Pallas, the TPU of the mesh which `jax.set_mesh` has set,
    or else the default device.
    """
    if not pltpu.is_tpu_device():
        return UNKNOWN
    return CHIPS.get(pltpu.get_tpu_info().chip_version, UNKNOWN)
