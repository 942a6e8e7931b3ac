"""The named cases of `python -m benchmarks step`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.steps.dlrm import MULTI_HOT, ONE_HOT, dlrm
from benchmarks.steps.model import Model
from benchmarks.steps.one_table import one_table
from benchmarks.steps.six_tables import six_tables
from benchmarks.steps.two_tower import two_tower
from benchmarks.steps.word2vec import word2vec


@dataclass(frozen=True)
class StepCase:
    """A model of a size."""

    name: str
    title: str
    build: Callable[[int, int, int], Model]  # of cap, dim and batch
    cap: int  # the most rows of a table
    dim: int  # D
    batch: int  # samples

    def model(self) -> Model:
        """Returns the model."""
        return self.build(self.cap, self.dim, self.batch)

    def sized(
        self, *, cap: int | None, dim: int | None, batch: int | None
    ) -> "StepCase":
        """Returns the case with other sizes, where they are given."""
        return replace(
            self, cap=cap or self.cap, dim=dim or self.dim, batch=batch or self.batch
        )


def _dlrm(places: tuple[int, ...], dense: str) -> Callable[[int, int, int], Model]:
    return partial(dlrm, places=places, dense=dense)


# Timed on the machine at hand. `dlrm_dim_64` is the row of a step beside torch.
TIMED = (
    StepCase("dlrm", "DLRM-v2", _dlrm(ONE_HOT, "light"), 200_000, 128, 2048),
    StepCase(
        *("dlrm_multi_hot", "DLRM-v2, 214 ids a sample"),
        *(_dlrm(MULTI_HOT, "light"), 200_000, 128, 2048),
    ),
    StepCase(
        *("dlrm_dim_64", "DLRM-v2, 214 ids a sample, D = 64"),
        *(_dlrm(MULTI_HOT, "light"), 586_000, 64, 2048),
    ),
    StepCase("two_tower", "two towers", two_tower, 500_000, 64, 1024),
    StepCase("word2vec", "word2vec", word2vec, 200_000, 128, 4096),
)
# Of a second or so each, for a look.
QUICK = (
    StepCase(
        *("quick_dlrm", "DLRM-v2, 214 ids a sample"),
        *(_dlrm(MULTI_HOT, "light"), 20_000, 16, 128),
    ),
    StepCase("quick_two_tower", "two towers", two_tower, 50_000, 32, 256),
    StepCase("quick_word2vec", "word2vec", word2vec, 50_000, 32, 512),
)
# A lookup and an update and next to nothing else: where plain storage is compared with
# packed. For those who name them.
STORED = tuple(
    StepCase(f"one_table_dim_{dim}", f"one table, D = {dim}", one_table, *sizes)
    for dim, sizes in (
        (128, (500_000, 128, 65_536)),
        (64, (1_000_000, 64, 65_536)),
        (16, (1_000_000, 16, 65_536)),
    )
)
# Compiled for TPUs, with all of DLRM's dense part; and with next to none, since that
# takes most of the time of a compile.
COMPILED = (
    StepCase("one_table", "one table", one_table, 1_000_000, 128, 65_536),
    StepCase("six_tables", "six tables", six_tables, 1_000_000, 128, 8192),
    StepCase("dlrm", "DLRM-v2", _dlrm(ONE_HOT, "mlperf"), 1_000_000, 128, 8192),
    StepCase(
        *("dlrm_light", "DLRM-v2, a small dense part"),
        *(_dlrm(ONE_HOT, "light"), 1_000_000, 128, 8192),
    ),
    StepCase(
        *("dlrm_multi_hot", "DLRM-v2, 214 ids a sample"),
        *(_dlrm(MULTI_HOT, "mlperf"), 1_000_000, 128, 1024),
    ),
    StepCase("two_tower", "two towers", two_tower, 500_000, 64, 4096),
    StepCase("word2vec", "word2vec", word2vec, 200_000, 128, 4096),
)
COMPILED_QUICK = (
    StepCase("quick_two_tower", "two towers", two_tower, 50_000, 128, 1024),
)
