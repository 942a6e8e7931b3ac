"""The TPU generations that libtpu compiles for."""

from dataclasses import dataclass

from sparse_adam.kernels import chips


@dataclass(frozen=True, slots=True)
class AnalyzedChip:
    """What the analysis must know of a generation that its dumps do not say.

    `clock` and `bandwidth` are of one JAX device: published, but for the clocks of v5p,
    v6e and 7x, which follow from the published peak of their matrix units. The clock of
    the SparseCores is not published; the TensorCore's stands in for it.
    """

    name: str
    topology: str
    clock: float  # GHz
    bandwidth: float  # GB/s of HBM
    delay_slots: int | None  # bundles that run after a TensorCore branch
    granule: int  # bytes of one TensorCore DMA granule
    subcores: int = 0  # of one JAX device
    subcore_delay_slots: int | None = None  # where the dump does not print them
    kinds: tuple[str, ...] = ()  # what JAX calls its devices
    config: str | None = None  # how libtpu is to make devices of its cores

    @property
    def topology_options(self) -> dict[str, str]:
        """Returns what `get_topology_desc` must be told beside the topology."""
        return {} if self.config is None else {"chip_config_name": self.config}

    @property
    def cores(self) -> int:
        """Returns the TensorCores of one JAX device."""
        return chips.CHIPS[self.name].cores


# The delay slots are the distance from a branch to the end of its region in every dump.
# On 7x it varies, as on its SparseCore, where the dump prints it with each branch.
CHIPS = {
    chip.name: chip
    for chip in (
        # Without it a v4 is two devices, each with half of the bandwidth.
        AnalyzedChip(
            *("v4", "v4:2x2x1", 1.05, 1228, 1, 512),
            kinds=("TPU v4",),
            config="megacore",
        ),
        AnalyzedChip(
            "v5e", "v5e:2x2", 1.5, 819, 4, 32, kinds=("TPU v5 lite", "TPU v5e")
        ),
        AnalyzedChip(
            "v5p", "v5p:2x2x1", 1.75, 2765, 4, 32, 64, 2, ("TPU v5", "TPU v5p")
        ),
        AnalyzedChip(
            "v6e", "v6e:2x2", 1.75, 1638, 4, 32, 32, 2, ("TPU v6 lite", "TPU v6e")
        ),
        AnalyzedChip(
            "7x", "tpu7x:2x2x1", 2.2, 3690, None, 32, 32, kinds=("TPU7x", "TPU v7x")
        ),
    )
}
# The most operations of a kind that were seen in one bundle of any program here.
SLOTS = {
    "tensorcore": {"vld": 3, "vst": 4, "valu": 6, "xlu": 4, "eup": 1, "mxu": 2},
    "subcore": {"vld": 1, "vst": 1, "valu": 4, "xlu": 2, "eup": 1, "mxu": 1},
}
