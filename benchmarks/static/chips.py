"""The TPU generations that libtpu compiles for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """What the analysis must know of a generation that its dumps do not say."""

    name: str
    topology: str
    delay_slots: int | None  # bundles that run after a TensorCore branch
    granule: int  # bytes of one TensorCore DMA granule
    subcores: int = 0  # of one JAX device
    subcore_delay_slots: int | None = None  # where the dump does not print them


# The delay slots are the distance from a branch to the end of its region in every dump.
# On 7x it varies, as on its SparseCore, where the dump prints it with each branch.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:2x2x1", delay_slots=1, granule=512),
        Chip("v5e", "v5e:2x2", delay_slots=4, granule=32),
        Chip("v5p", "v5p:2x2x1", 4, 32, subcores=64, subcore_delay_slots=2),
        Chip("v6e", "v6e:2x2", 4, 32, subcores=32, subcore_delay_slots=2),
        Chip("7x", "tpu7x:2x2x1", None, 32, subcores=32),
    )
}
