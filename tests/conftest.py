"""What holds for every test: a CPU, strict JAX, and hypothesis at a steady pace."""

import faulthandler
import gc
import os

from tests.xla_flags import QUICKLY

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
os.environ["XLA_FLAGS"] = f"{QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is imported

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for shard_map
jax.devices()  # has read the flags; child processes compile as users' do:
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removeprefix(f"{QUICKLY} ")

# Tracing makes many objects, and each time all that jax keeps is looked through.
gc.set_threshold(20_000, 10, 10)

# Few examples and no deadline, since each may compile.
hypothesis.settings.register_profile("default", deadline=None, max_examples=20)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_finish() -> None:
    """Leaves all modules out of what the garbage collector looks through."""
    gc.freeze()


# A wait for a DMA that never started would be for ever; this is many times the slowest.
DEADLOCK_SECONDS = 240


@pytest.fixture
def run_in_tpu_interpreter(
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., Any]]:
    """Runs `f(*args)` with its Pallas kernels in the interpreter that models a TPU.

    A DMA happens only when it is waited for, fresh memory is full of NaN, an access out
    of bounds raises, two accesses without an order between them fail the test, and a
    deadlock ends the process.
    """
    yield from _tpu_interpreter(capfd, cores=1)


@pytest.fixture
def run_on_two_cores(
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., Any]]:
    """Does the same on two TensorCores, between which there is no order at all."""
    yield from _tpu_interpreter(capfd, cores=2)


def _tpu_interpreter(
    capfd: pytest.CaptureFixture[str], cores: int
) -> Iterator[Callable[..., Any]]:
    # Not public, and there is no public way to ask whether a race was found.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    interpreter: Any = interpret_pallas_call

    def races_found() -> bool:
        if hasattr(interpreter, "get_races"):
            return interpreter.get_races().races_found
        return interpreter.races.races_found

    def run(f: Callable[..., Any], *args: Any) -> Any:
        pltpu.reset_tpu_interpret_mode_state()
        params = pltpu.InterpretParams(
            dma_execution_mode="on_wait",
            uninitialized_memory="nan",
            detect_races=True,
            out_of_bounds_reads="raise",
            num_cores_or_threads=cores,
        )
        with capfd.disabled(), pltpu.force_tpu_interpret_mode(params):
            faulthandler.dump_traceback_later(DEADLOCK_SECONDS, exit=True)
            try:
                result = jax.block_until_ready(f(*args))
            finally:
                faulthandler.cancel_dump_traceback_later()
        assert not races_found(), "the interpreter printed the races above"
        return result

    yield run
    pltpu.reset_tpu_interpret_mode_state()
