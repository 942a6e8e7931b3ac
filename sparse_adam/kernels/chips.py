"""The TPU generations: one record each, of what block sizes and choices depend on.

Bandwidth: Google Cloud's documentation of each generation, for one JAX device: half a
chip on 7x; on v4 and v5p a chip, whose two TensorCores are one device ("megacore").
Clock: from the published bfloat16 peak and the size of the matrix units; v4's from
Jouppi et al., "TPU v4" (ISCA 2023). All else: `pltpu.get_tpu_info`.
"""

import dataclasses
from typing import Any

from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    """One JAX device of a generation.

    Attributes:
        name: as this package and its benchmarks call it.
        version: as Pallas calls it; None of a TPU that nobody has named.
        hbm_gb_per_s: peak bandwidth of its memory.
        clock_ghz: of the TensorCore.
        cores: TensorCores, which share the memory and its bandwidth.
    """

    name: str
    version: Any
    hbm_gb_per_s: int
    clock_ghz: float
    cores: int = 1

    @property
    def vmem_bytes(self) -> int:
        """Returns what a TensorCore has; of an unknown TPU the least of all."""
        return _VMEM_LEAST if self.version is None else self._info.vmem_capacity_bytes

    @property
    def sparse_core(self) -> Any:
        """Returns `pltpu.SparseCoreInfo`, or None where the kernel cannot run."""
        if self.version not in _WITH_SPARSECORE:
            return None
        return self._info.sparse_core

    @property
    def subcores(self) -> int:
        """Returns the vector subcores of the device."""
        info = self.sparse_core
        return 0 if info is None else info.num_cores * info.num_subcores

    @property
    def _info(self) -> Any:
        return pltpu.get_tpu_info_for_chip(self.version, 1)


_VERSIONS = pltpu.ChipVersion
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", _VERSIONS.TPU_V4, 1228, 1.05, 2),
        Chip("v5e", _VERSIONS.TPU_V5E, 819, 1.5),
        Chip("v5p", _VERSIONS.TPU_V5P, 2765, 1.75, 2),
        Chip("v6e", _VERSIONS.TPU_V6E, 1638, 1.75),
        Chip("7x", _VERSIONS.TPU_7X, 3690, 2.2),
    )
}
# The kernel has been compiled for these; a new generation is to be tried first.
_WITH_SPARSECORE = tuple(CHIPS[name].version for name in ("v5p", "v6e", "7x"))
_VMEM_LEAST = 16 * 2**20
VMEM_BUDGET = _VMEM_LEAST // 2  # of a row kernel: half of what v4, the smallest, has
# For a program that is traced for a TPU nobody has named: the least of each.
UNKNOWN = Chip("unknown", None, 819, 1.05)


def in_scope() -> Chip:
    """Returns the generation of the TPU in scope while tracing, or `UNKNOWN`.

    That is, as everywhere in Pallas, the TPU of the mesh which `jax.set_mesh` has set,
    or else the default device.
    """
    if not pltpu.is_tpu_device():
        return UNKNOWN
    info = pltpu.get_tpu_info()
    known = (chip for chip in CHIPS.values() if chip.version == info.chip_version)
    chip = next(known, UNKNOWN)
    if chip is UNKNOWN or chip.cores == info.num_cores:
        return chip
    # A chip whose cores are devices of their own, each with its share of the memory.
    shared = chip.hbm_gb_per_s * info.num_cores // chip.cores
    return dataclasses.replace(chip, hbm_gb_per_s=shared, cores=info.num_cores)
