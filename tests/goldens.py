"""Numbers of TensorFlow: of its own test of this optimizer, of its formula run by XLA,
and of other optimizers that this one equals with the right learning rate.

A: `_check_embedding_and_slot_variables_for_adam` of `tpu_embedding_base_test.py`.
B: the expression of `BuildAdamOptimizerComputation`, `sparse_core_ops_utils.cc`.
C: every option, by the same expression. E: Keras Adam and LazyAdam.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NAMES = ("table", "momenta", "velocities")


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One update and what it must give; what is None is not checked."""

    ids: Any
    grads: Any
    table: Any = None
    momenta: Any = None
    velocities: Any = None
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Golden:
    """Steps from zero slots, within the tolerances that the digits given allow."""

    name: str
    table: Any
    steps: tuple[Step, ...]
    options: Mapping[str, Any]
    rtol: float
    atol: float = 0.0

    def check(self, update: Callable[..., Any], dim: int | None = None) -> None:
        """Makes the steps with `update`, every row repeated to a width of `dim`."""
        repeats = (1, (dim or np.shape(self.table)[1]) // np.shape(self.table)[1])
        table = np.tile(np.float32(self.table), repeats)
        state = (table, np.zeros_like(table), np.zeros_like(table))
        for number, step in enumerate(self.steps, start=1):
            ids, grads = np.asarray(step.ids), np.tile(np.float32(step.grads), repeats)
            state = update(*state, ids, grads, **self.options, **step.keywords)
            for name, actual in zip(NAMES, state, strict=True):
                expected = getattr(step, name)
                if expected is not None:
                    np.testing.assert_allclose(
                        np.asarray(actual),
                        np.tile(expected, repeats),
                        rtol=self.rtol,
                        atol=self.atol,
                        err_msg=f"{name} after step {number}",
                    )


def _video(row_0: Any, row_1: Any, inside: bool) -> Golden:
    table = np.arange(32.0).reshape(8, 4)
    expected, m, v = table.copy(), np.zeros((8, 4)), np.zeros((8, 4))
    expected[:2] = row_0, row_1
    m[:2] = [0.8, 1.3, 1.8, 2.3], [1.2, 1.7, 2.2, 2.7]
    v[:2] = [0.064, 0.169, 0.324, 0.529], [0.144, 0.289, 0.484, 0.729]
    # Watched [[0], [0, 1]] and favorited [[0, 1], [1]]; a sample's gradient is the
    # sum of the rows it looked up.
    grads = [[0, 1, 2, 3], [4, 6, 8, 10], [4, 6, 8, 10], [4, 5, 6, 7]]
    lookups = {"sample_ids": np.array([0, 1, 1, 2, 2, 3])}
    step = Step([0, 0, 1, 0, 1, 1], grads, expected, m, v, lookups)
    options = {"learning_rate": 0.1, "sum_inside_sqrt": inside}
    return Golden(f"A_video_inside_{inside}", table, (step,), options, 1.5e-5, 3e-6)


def _user(rows: Any, inside: bool) -> Golden:
    table = np.arange(32.0).reshape(16, 2)
    expected, m, v = table.copy(), np.zeros((16, 2)), np.zeros((16, 2))
    expected[:4] = rows
    m[:3], m[3] = [1 / 15, 0.1], [0.6, 0.7]
    v[:3], v[3] = [4e-3 / 9, 1e-3], [0.036, 0.049]
    lookups = {
        "sample_ids": np.array([0, 1, 1, 1]),
        "gains": np.array([1, 1 / 3, 1 / 3, 1 / 3], np.float32),
    }
    step = Step([3, 0, 1, 2], [[6, 7], [2, 3]], expected, m, v, lookups)
    options = {"learning_rate": 0.1, "sum_inside_sqrt": inside}
    return Golden(f"A_user_inside_{inside}", table, (step,), options, 1.5e-5, 3e-6)


_A = (
    _video(
        [-0.316227766, 0.683772234, 1.683772234, 2.683772234],
        [3.683772234, 4.683772234, 5.683772234, 6.683772234],
        inside=True,
    ),
    _video(
        [-0.316227641, 0.683772311, 1.683772290, 2.683772277],
        [3.683772317, 4.683772293, 5.683772279, 6.683772271],
        inside=False,
    ),
    _user(
        [
            [-0.316227766, 0.683772234],
            [1.683772234, 2.683772234],
            [3.683772234, 4.683772234],
            [5.683772234, 6.683772234],
        ],
        inside=True,
    ),
    _user(
        [
            [-0.316226266, 0.683773234],
            [1.683773734, 2.683773234],
            [3.683773734, 4.683773234],
            [5.683772401, 6.683772377],
        ],
        inside=False,
    ),
)


def _b(inside: bool, *tables: Any) -> Golden:
    grads = ([0.5, -2, 0, 1e-8], [0, 1, 0, 0], [-0.25, 0.5, 1e-3, 0])
    momenta = (
        [0.05000001, -0.20000005, 0, 1.0000002e-09],
        [0.04500001, -0.08000001, 0, 9.0000013e-10],
        [0.0155, -0.022, 1.0000003e-04, 8.1000012e-10],
    )
    velocities = (
        [2.4999678e-04, 3.9999485e-03, 0, 9.999872e-20],
        [2.4974678e-04, 4.9959356e-03, 0, 9.989872e-20],
        [3.1199623e-04, 5.2409363e-03, 9.999872e-10, 9.979882e-20],
    )
    steps = tuple(
        Step([0], [g], [w], [m], [v])
        for g, w, m, v in zip(grads, tables, momenta, velocities, strict=True)
    )
    options = {"learning_rate": 0.01, "sum_inside_sqrt": inside}
    return Golden(f"B_inside_{inside}", [[1, -1, 0.5, 0]], steps, options, 4e-7)


_B = (
    _b(
        True,
        [0.9683770, -0.9683770, 0.5, -9.999952e-05],
        [0.9399021, -0.9570587, 0.5, -1.899991e-04],
        [0.9311269, -0.9540198, 0.4683772, -2.709987e-04],
    ),
    _b(
        False,
        [0.9683772, -0.9683771, 0.5, -9.968479e-05],
        [0.9399025, -0.9570588, 0.5, -1.894012e-04],
        [0.9311273, -0.9540199, 0.4684767, -2.701462e-04],
    ),
)


def _c(name: str, options: Any, first: Any, second: Any, m: Any, v: Any) -> Golden:
    steps = (
        Step([0, 1], [[0.3, -0.6], [0, 0]], first),
        Step([1, 2], [[0.2, 0.1], [5, -5]], second, m, v),
    )
    table = [[1, -1], [0.5, 0.25], [2, -2]]
    options = {"learning_rate": 0.1, **options}
    return Golden(f"C_{name}", table, steps, options, 2e-7, 2e-7)


_ROW_0, _ROW_1 = [0.6837701, -0.6837701], [0.1837701, -0.0662299]
_ROW_2 = [1.6837702, -1.6837702]
_START_1, _START_2 = [0.5, 0.25], [2, -2]
_M = [[0.03, -0.06], [0.02, 0.01], [0.5, -0.5]]
_V = [[8.999884e-5, 3.5999538e-4], [3.9999486e-5, 9.9998715e-6], [0.024999678] * 2]
_M_ALL = [[0.027, -0.054], *_M[1:]]
_V_ALL = [[8.990885e-5, 3.5963539e-4], *_V[1:]]
_LAZY_FIRST = [_ROW_0, _START_1, _START_2]
_BY_RATE = "multiply_weight_decay_factor_by_learning_rate"
_C = (
    _c("lazy", {}, _LAZY_FIRST, [_ROW_0, _ROW_1, _ROW_2], _M, _V),
    _c(
        "not_lazy",
        {"lazy_adam": False},
        _LAZY_FIRST,
        [[0.3990208, -0.3990208], _ROW_1, _ROW_2],
        _M_ALL,
        _V_ALL,
    ),
    _c(
        "clipvalue",
        {"clipvalue": 1.0},
        _LAZY_FIRST,
        [_ROW_0, _ROW_1, _ROW_2],
        [*_M[:2], [0.1, -0.1]],
        [*_V[:2], [9.999871e-4] * 2],
    ),
    _c(
        "decay",
        {"weight_decay_factor": 0.1},
        [[0.5837700, -0.5837700], [0.45, 0.225], _START_2],
        [[0.5837700, -0.5837700], [0.0887701, -0.1137299], [1.4837701, -1.4837701]],
        _M,
        _V,
    ),
    _c(
        "decay_by_rate",
        {"weight_decay_factor": 0.1, _BY_RATE: True},
        [[0.6737701, -0.6737701], [0.495, 0.2475], _START_2],
        [[0.6737701, -0.6737701], [0.1738201, -0.0712049], [1.6637702, -1.6637702]],
        _M,
        _V,
    ),
    _c(
        "not_lazy_decay",
        {"lazy_adam": False, "weight_decay_factor": 0.1},
        [[0.5837700, -0.5837700], [0.45, 0.225], [1.8, -1.8]],
        [[0.2406437, -0.2406437], [0.0887701, -0.1137299], [1.3037701, -1.3037701]],
        _M_ALL,
        _V_ALL,
    ),
    _c(
        "clip_weights",
        {"clip_weight_min": -0.9, "clip_weight_max": 0.9},
        _LAZY_FIRST,
        [_ROW_0, _ROW_1, [0.9, -0.9]],
        _M,
        _V,
    ),
    _c(
        "all",
        {
            "lazy_adam": False,
            "sum_inside_sqrt": False,
            "clipvalue": (None, 1.0),
            "weight_decay_factor": 0.1,
            _BY_RATE: True,
            "clip_weight_min": -0.9,
            "clip_weight_max": 0.9,
        },
        [[0.6737734, -0.6737718], [0.495, 0.2475], [0.9, -0.9]],
        [[0.3822894, -0.3822863], [0.1738251, -0.0711949], [0.5747711, -0.5747703]],
        [*_M_ALL[:2], [0.1, -0.5]],
        [*_V_ALL[:2], [9.999871e-4, 0.024999678]],
    ),
)


def corrected(learning_rate: float, step: int) -> float:
    """The bias correction as TensorFlow's CPU optimizers make it, in float64."""
    return learning_rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)


E_BATCHES = (
    ([0, 2], [[1, -1], [0.5, 0.25]]),
    ([1, 1], [[2, 0], [1, 1]]),
    ([0], [[0, 0]]),
)


def _e(name: str, rates: Any, options: Any, expected: Any, atol: float) -> Golden:
    steps = tuple(
        Step(*batch, table, keywords={"learning_rate": rate})
        for batch, table, rate in zip(
            E_BATCHES, (None, None, expected), rates, strict=True
        )
    )
    return Golden(f"E_{name}", np.ones((3, 2)), steps, options, 0.0, atol)


_CORRECTED = tuple(corrected(0.1, step) for step in (1, 2, 3))
KERAS_TABLE = [[0.781199, 1.218801], [0.868065, 0.868065], [0.781200, 0.781201]]
LAZY_TABLE = [[0.842479, 1.157521], [0.925586, 0.925587], [0.900001, 0.900001]]
_E = (
    _e(
        "keras",
        _CORRECTED,
        {"lazy_adam": False, "sum_inside_sqrt": False},
        KERAS_TABLE,
        2e-6,
    ),
    _e("lazy_adam", _CORRECTED, {"sum_inside_sqrt": False}, LAZY_TABLE, 2e-6),
    _e(
        "tpu",
        (0.1, 0.1, 0.1),
        {},
        [[0.399025, 1.600975], [0.683772, 0.683772], [0.683772, 0.683772]],
        6e-6,  # worked with 1 - beta in float64
    ),
)

ALL = (*_A, *_B, *_C, *_E)
