"""What a user's arguments must be. Every error names the argument, its value and
the way out, and is raised before anything is traced or moved.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.problem import Hyperparams, Problem

STORED_DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def problem(
    *,
    table: Any,
    momenta: Any,
    velocities: Any,
    ids: Any,
    grads: Any,
    sample_ids: Any,
    gains: Any,
    plan: Any,
    lazy_adam: bool,
    use_gradient_accumulation: bool,
    clipvalue: Any,
    rounding: str,
    key: Any,
    packed: bool = False,
    **numbers: Any,
) -> Problem:
    """Checks every argument but the rate, by shape and dtype; sees no values."""
    modes(
        lazy_adam=lazy_adam,
        use_gradient_accumulation=use_gradient_accumulation,
        clipvalue=clipvalue,
    )
    hyper = hyperparams(clipvalue=clipvalue, **numbers)
    shape, dtypes = stored(table, momenta, velocities)
    stochastic = _rounding(rounding, key)
    num_rows, dim = shape

    ids_shape = integers("ids", ids)
    num_ids = math.prod(ids_shape)
    grads_shape, grads_dtype = np.shape(grads), np.dtype(jnp.result_type(grads))
    if not jnp.issubdtype(grads_dtype, jnp.floating):
        raise TypeError(f"grads.dtype={grads_dtype} must be floating: pass float32")
    if sample_ids is None:
        num_grads = num_ids
        if grads_shape != (*ids_shape, dim):
            raise ValueError(
                f"grads.shape={grads_shape} must be ids.shape + (D,) = "
                f"{(*ids_shape, dim)}, or (B, {dim}) with sample_ids"
            )
    else:
        if len(grads_shape) != 2 or grads_shape[1] != dim or grads_shape[0] < 1:
            raise ValueError(
                f"grads.shape={grads_shape} must be (B, {dim}) with sample_ids, B >= 1"
            )
        num_grads = grads_shape[0]
        _same_shape("sample_ids", integers("sample_ids", sample_ids), ids_shape)
    if gains is not None:
        if not jnp.issubdtype(jnp.result_type(gains), jnp.floating):
            raise TypeError(
                f"gains.dtype={jnp.result_type(gains)} must be floating: pass float32"
            )
        _same_shape("gains", np.shape(gains), ids_shape)
    if plan is not None and (plan.num_rows, plan.ids.shape) != (num_rows, (num_ids,)):
        raise ValueError(
            f"plan is for {plan.ids.size} ids of {plan.num_rows} rows, but there are "
            f"{num_ids} ids and {num_rows} rows: pass plan_update(ids, {num_rows})"
        )
    return Problem(
        num_rows=num_rows,
        dim=dim,
        num_ids=num_ids,
        num_grads=num_grads,
        table_dtype=dtypes[0],
        momenta_dtype=dtypes[1],
        velocities_dtype=dtypes[2],
        grads_dtype=grads_dtype,
        weighted=sample_ids is not None or gains is not None,
        lazy=lazy_adam,
        accumulate=use_gradient_accumulation,
        hyper=hyper,
        stochastic=stochastic and any(dtype != np.float32 for dtype in dtypes),
        packed=packed,
    )


def stored(
    table: Any, momenta: Any, velocities: Any
) -> tuple[tuple[int, int], tuple[np.dtype, np.dtype, np.dtype]]:
    """The shape (V, D) that all three arrays have, and their dtypes."""
    shape, table_dtype = _stored("table", table)
    dtypes = []
    for name, slot in (("momenta", momenta), ("velocities", velocities)):
        slot_shape, dtype = _stored(name, slot)
        if slot_shape != shape:
            raise ValueError(
                f"{name}.shape={slot_shape} must be table.shape={shape}: slots hold "
                "one number for each weight"
            )
        dtypes.append(dtype)
    return shape, (table_dtype, *dtypes)


def _rounding(rounding: Any, key: Any) -> bool:
    """Whether it is stochastic."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{rounding=} must be 'nearest' or 'stochastic'")
    stochastic = rounding == "stochastic"
    if stochastic and key is None:
        raise ValueError(
            f"{rounding=} needs a key: pass key=jax.random.fold_in(key, step), a new "
            "one for each update"
        )
    if not stochastic and key is not None:
        raise ValueError(
            f"a key is of no use for {rounding=}: pass rounding='stochastic', or no key"
        )
    return stochastic


def _stored(name: str, array: Any) -> tuple[tuple[int, int], np.dtype]:
    shape, dtype = np.shape(array), np.dtype(jnp.result_type(array))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}.shape={shape} must be (V, D), both at least 1")
    if dtype not in STORED_DTYPES:
        raise TypeError(
            f"{name}.dtype={dtype} must be float32 or bfloat16: pass "
            f"{name}.astype(jnp.float32)"
        )
    return shape, dtype


def integers(name: str, array: Any) -> tuple[int, ...]:
    """The shape of an array of any integer dtype."""
    dtype = getattr(array, "dtype", None) or np.asarray(array).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name}.dtype={dtype} must be an integer dtype: pass "
            f"{name}.astype(jnp.int32)"
        )
    return np.shape(array)


def _same_shape(name: str, shape: tuple[int, ...], ids_shape: tuple[int, ...]) -> None:
    if shape != ids_shape:
        raise ValueError(
            f"{name}.shape={shape} must be ids.shape={ids_shape}: one for each id"
        )


def hyperparams(
    *,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    sum_inside_sqrt: bool,
    clip_weight_min: float | None,
    clip_weight_max: float | None,
    weight_decay_factor: float | None,
    multiply_weight_decay_factor_by_learning_rate: bool | None,
    clipvalue: float | tuple[float | None, float | None] | None,
) -> Hyperparams:
    """Checks the static numbers of an update and gives them their final form."""
    low, high = clip_bounds(clipvalue)
    bounds = (clip_weight_min, clip_weight_max)
    clip_min, clip_max = _ordered("clip_weight_min", "clip_weight_max", *bounds)
    decay = 0.0
    if weight_decay_factor is not None:
        decay = _number("weight_decay_factor", weight_decay_factor)
        if not math.isfinite(decay):
            raise ValueError(f"{weight_decay_factor=} must be finite, or None for none")
    return Hyperparams(
        beta_1=beta("beta_1", beta_1),
        beta_2=beta("beta_2", beta_2),
        epsilon=_epsilon(epsilon, sum_inside_sqrt),
        sum_inside_sqrt=flag("sum_inside_sqrt", sum_inside_sqrt),
        clip_weight_min=clip_min,
        clip_weight_max=clip_max,
        weight_decay_factor=decay,
        multiply_weight_decay_factor_by_learning_rate=flag(
            "multiply_weight_decay_factor_by_learning_rate",
            multiply_weight_decay_factor_by_learning_rate or False,
        ),
        clip_gradient_min=low,
        clip_gradient_max=high,
    )


def modes(
    *,
    lazy_adam: bool,
    use_gradient_accumulation: bool,
    clipvalue: object,
) -> None:
    """Checks the modes against each other: both exceptions need accumulation."""
    flag("lazy_adam", lazy_adam)
    if flag("use_gradient_accumulation", use_gradient_accumulation):
        return
    if clipvalue is not None:
        raise ValueError(
            f"{clipvalue=} clips the accumulated gradient, so it needs "
            "use_gradient_accumulation=True; or pass clipvalue=None"
        )
    if not lazy_adam:
        raise ValueError(
            "lazy_adam=False needs use_gradient_accumulation=True: a step for each "
            "occurrence has no meaning for rows that do not occur"
        )


def clip_bounds(clipvalue: Any) -> tuple[float | None, float | None]:
    """`x` means `(-x, x)`; of a tuple, each side may be None: open."""
    if clipvalue is None:
        return None, None
    if isinstance(clipvalue, tuple):
        if len(clipvalue) != 2:
            raise ValueError(f"{clipvalue=} must be a number or a pair (low, high)")
        return _ordered("clipvalue[0]", "clipvalue[1]", *clipvalue)
    x = _number("clipvalue", clipvalue)
    if math.isnan(x) or x < 0:
        raise ValueError(f"{clipvalue=} must be >= 0, or a pair (low, high)")
    return _ordered("-clipvalue", "clipvalue", -x, x)


def learning_rate(rate: Any) -> jax.Array:
    """A float32 scalar: a number, an array of shape `()`, or a traced one."""
    if callable(rate):
        raise TypeError(
            f"learning_rate={rate!r} is a callable: pass its value, "
            "learning_rate=schedule(step), so that it is not frozen when this is traced"
        )
    if not _is_real(rate):
        raise TypeError(f"learning_rate={rate!r} must be a real number")
    if np.shape(rate) != ():
        raise ValueError(
            f"learning_rate has shape {np.shape(rate)} but one update has one rate: "
            "pass a scalar"
        )
    if isinstance(rate, float | int) and not math.isfinite(rate):
        raise ValueError(f"learning_rate={rate} must be finite")
    return jnp.asarray(rate, jnp.float32)


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that only looks like it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False, known when tracing")
    return bool(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced; only learning_rate may be. Pass a Python number"
        )
    if not _is_real(value) or np.shape(value) != ():
        raise TypeError(f"{name}={value!r} must be a number")
    return float(value)


def _is_real(value: Any) -> bool:
    if isinstance(value, float | int):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", np.dtype(bool))
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def beta(name: str, value: Any) -> float:
    """A decay rate, in [0, 1) also after rounding to float32."""
    rate = _number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate} must be >= 0 and < 1")
    if np.float32(rate) == 1:
        raise ValueError(f"{name}={rate} is 1 in float32: pass at most 0.9999999")
    return rate


def _epsilon(value: Any, sum_inside_sqrt: bool) -> float:
    epsilon = _number("epsilon", value)
    if not epsilon > 0:
        raise ValueError(
            f"epsilon={epsilon} must be positive: a row without gradients divides by it"
        )
    if not math.isfinite(epsilon):
        raise ValueError(f"epsilon={epsilon} must be finite")
    if sum_inside_sqrt and float(np.float32(epsilon)) ** 2 < _SMALLEST_NORMAL:
        raise ValueError(
            f"epsilon={epsilon}: epsilon**2 underflows float32, and a row without "
            "gradients would become NaN. Pass at least 1.1e-19, or "
            "sum_inside_sqrt=False"
        )
    if epsilon < _SMALLEST_NORMAL:
        raise ValueError(f"epsilon={epsilon} underflows float32: pass at least 1.2e-38")
    return epsilon


def _ordered(
    low_name: str, high_name: str, low: Any, high: Any
) -> tuple[float | None, float | None]:
    bounds = []
    for name, value in ((low_name, low), (high_name, high)):
        bound = None if value is None else _number(name, value)
        if bound is not None and math.isnan(bound):
            raise ValueError(f"{name}={bound} must be a number, or None for no bound")
        bounds.append(bound)
    low, high = bounds
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"{low_name}={low} is above {high_name}={high}: exchange them, or pass "
            "None for an open side"
        )
    return low, high
