"""Device times from profiles made by hand, and what was predicted."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cases import Case
from benchmarks.device_time import device_clock, module_seconds, predicted_ms


def plane(name, **lines):
    return SimpleNamespace(
        name=name,
        lines=[
            SimpleNamespace(
                name=line.replace("_", " "),
                events=[SimpleNamespace(duration_ns=ns) for ns in durations],
            )
            for line, durations in lines.items()
        ],
    )


def test_programs_are_added_up_on_the_busiest_device():
    planes = [
        plane("/host:CPU", XLA_Modules=[9e9]),
        plane("/device:TPU:0", XLA_Modules=[1e6, 2e6], XLA_Ops=[5e9]),
        plane("/device:TPU:1", XLA_Modules=[2e6]),
    ]
    assert module_seconds(planes) == 0.003


def test_a_profile_without_a_tpu_is_an_error():
    called = []
    with pytest.raises(RuntimeError, match="no TPU"):
        device_clock(lambda: called.append(jax.block_until_ready(jnp.ones(2) + 1)))
    assert len(called) == 1


def test_predictions_are_of_the_chip_and_the_width():
    case = Case("wide", 10**6, 128, 65_536)
    kind = "TPU v6 lite"
    bound = predicted_ms("tensorcore", case, 1e6, kind)
    assert bound is not None and 5 < bound < 40
    assert predicted_ms("tensorcore", case, 5e5, kind) == bound / 2
    assert predicted_ms("xla", case, 1e6, kind) is None
    assert predicted_ms("tensorcore", case, 1e6, "cpu") is None
    assert predicted_ms("tensorcore", Case("D", 9, 64, 9), 9, kind) is None
    assert predicted_ms("sparsecore", case, 1e6, "TPU v4") is None


def test_a_sweep_is_predicted_at_its_size_only_and_a_packed_table_by_the_best():
    kind, case = "TPU v6 lite", Case("", 10**6, 128, 65_536)
    swept = predicted_ms("sweep", case, 60_000, kind)
    # Six passes over a table of 512 MB, and the gradients.
    assert swept is not None and 1.8 < swept < 2.5
    assert predicted_ms("sweep", Case("", 10**5, 128, 65_536), 60_000, kind) is None
    packed = predicted_ms("packed", case, 1e6, kind)
    alone = predicted_ms("tensorcore", case, 1e6, kind)
    assert packed is not None and alone is not None and packed < alone
    slow = predicted_ms("packed", case, 1e6, "TPU v5 lite")  # no SparseCore
    assert slow is not None and slow > 3 * packed
