"""What a user says of an update, as one record each for its batch and its options."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding
from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.spec import StepScalars
from sparse_adam.ops.integers import to_array
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.rules import Limits, numbers


class UpdateInputs(NamedTuple):
    """A batch as a user passes it; `sparse_update` documents each argument."""

    ids: ArrayLike
    grads: ArrayLike
    sample_ids: ArrayLike | None = None
    gains: ArrayLike | None = None
    plan: UpdatePlan | None = None

    def converted(self) -> "UpdateInputs":
        """Returns the same with tensors of other packages as arrays.

        Raises:
            TypeError: one cannot be converted.
        """
        return self._replace(
            ids=to_array("ids", self.ids),
            grads=to_array("grads", self.grads),
            sample_ids=to_array("sample_ids", self.sample_ids),
            gains=to_array("gains", self.gains),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateOptions:
    """The options of an update, whatever its rule; `sparse_update` documents each.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: one out of its range, or two that exclude each other.
    """

    learning_rate: Any = 1e-3
    lazy: bool = True
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: Any = None
    multiply_weight_decay_factor_by_learning_rate: bool | None = None
    clipvalue: Any = None
    gradient_scale: Any = None
    rounding: Rounding = "nearest"
    key: jax.Array | None = None
    implementation: ImplementationName | None = None
    config: Any = None
    step: Any = None

    def __post_init__(self) -> None:
        self.limits()
        _check_rounding(self.rounding, self.key)
        multiply = self.multiply_weight_decay_factor_by_learning_rate
        if multiply is not None:
            numbers.flag("multiply_weight_decay_factor_by_learning_rate", multiply)
        if self.weight_decay_factor is not None:
            _float32("weight_decay_factor", self.weight_decay_factor)
        if self.step is not None:
            _check_step(self.step)
        numbers.flag("lazy", self.lazy)
        accumulate = numbers.flag(
            "use_gradient_accumulation", self.use_gradient_accumulation
        )
        if accumulate:
            return
        if self.clipvalue is not None:
            raise ValueError(
                f"clipvalue={self.clipvalue!r} clips the accumulated gradient, so it "
                "needs use_gradient_accumulation=True; or pass clipvalue=None"
            )
        if not self.lazy:
            raise ValueError(
                "lazy=False, or lazy_adam=False, needs use_gradient_accumulation=True: "
                "a step for each occurrence has no meaning for rows that do not occur"
            )

    def limits(self) -> Limits:
        """Returns the bounds of gradients and weights."""
        return Limits.of(self.clipvalue, self.clip_weight_min, self.clip_weight_max)

    @property
    def decays(self) -> bool:
        """Returns whether weights decay: the factor is traced, or is not 0."""
        factor = self.weight_decay_factor
        if factor is None:
            return False
        return isinstance(factor, jax.Array) or bool(factor != 0)

    @property
    def scales(self) -> bool:
        """Returns whether gradients are scaled."""
        return self.gradient_scale is not None

    def scalars(self, layout: Layout, *, stochastic: bool) -> StepScalars:
        """Returns the traced numbers of the update: no value of them recompiles."""
        rate = _float32("learning_rate", self.learning_rate)
        decay = scale = np.float32(0)
        if self.decays:
            decay = _float32("weight_decay_factor", self.weight_decay_factor)
            if self.multiply_weight_decay_factor_by_learning_rate:
                decay = decay * rate
        if self.scales:
            scale = _float32("gradient_scale", self.gradient_scale)
        given = (rate, decay, scale)
        if self.step is not None:
            given = (*given, _float32("step", self.step))
        # Of plain numbers in NumPy, which takes a hundredth of the time.
        plain = all(type(x) is np.float32 for x in given)
        vector = np.array(given) if plain else jnp.stack(given)
        seeds = None
        if stochastic and self.key is not None:
            bits = jax.random.bits(self.key, (len(layout.dtypes),), jnp.uint32)
            seeds = lax.bitcast_convert_type(bits, jnp.int32)
        return StepScalars(vector, seeds)  # type: ignore[arg-type]


def _float32(name: str, value: Any) -> Any:
    """Returns a float32 scalar: NumPy's of a plain number, else an array of JAX."""
    if type(value) in (float, int) and math.isfinite(value):
        return np.float32(value)
    return numbers.scalar(name, value)


def _check_step(step: Any) -> None:
    _float32("step", step)
    if not isinstance(step, jax.core.Tracer) and np.asarray(step) < 1:
        raise ValueError(f"{step=} must be at least 1: the first update is step 1")


def _check_rounding(rounding: Any, key: Any) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{rounding=} must be 'nearest' or 'stochastic'")
    if rounding == "nearest":
        if key is not None:
            raise ValueError(
                f"a key is of no use for {rounding=}: pass rounding='stochastic', or "
                "no key"
            )
        return
    if key is None:
        raise ValueError(
            f"{rounding=} needs a key: pass key=jax.random.fold_in(key, step), a new "
            "one for each update"
        )
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"{key=} must be a key of jax.random: pass jax.random.key({key!r})"
            if isinstance(key, int)
            else f"{key=} must be a key of jax.random"
        )
