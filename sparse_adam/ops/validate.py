"""What a user's arrays must be. Every error names the argument, its value and
the way out, and is raised before anything is traced or moved.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.layout import BFLOAT16, FLOAT32, Layout, PlainLayout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops.integers import integers
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.rules import UpdateRule, catches_up

STORED_DTYPES = (FLOAT32, BFLOAT16)


def update_spec(
    layout: Layout, inputs: UpdateInputs, rule: UpdateRule, options: UpdateOptions
) -> UpdateSpec:
    """Checks a batch against a table, by shapes and dtypes, and returns the record.

    Raises:
        TypeError: an array of the wrong kind, such as float ids.
        ValueError: a shape that does not fit.
    """
    num_rows, dim = layout.num_rows, layout.dim
    ids_shape = integers("ids", inputs.ids)
    num_ids = math.prod(ids_shape)
    if num_rows >= 2**31 - num_ids:
        raise ValueError(
            f"V={num_rows} rows and {num_ids} ids must be below 2**31 together, since "
            "ids are int32 in the update: split the table"
        )
    grads_shape = np.shape(inputs.grads)
    grads_dtype = np.dtype(jnp.result_type(inputs.grads))
    if not jnp.issubdtype(grads_dtype, jnp.floating):
        raise TypeError(f"grads.dtype={grads_dtype} must be floating: pass float32")
    num_grads = num_ids
    if inputs.sample_ids is None:
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
        own = integers("sample_ids", inputs.sample_ids)
        _same_shape("sample_ids", own, ids_shape)
    if inputs.gains is not None:
        dtype = jnp.result_type(inputs.gains)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"gains.dtype={dtype} must be floating: pass float32")
        _same_shape("gains", np.shape(inputs.gains), ids_shape)
    if catches_up(rule) != (options.step is not None):
        raise ValueError(
            f"step=None, but {rule!r} makes up for missed steps: pass the number of "
            "this update, step=1 at the first"
            if options.step is None
            else f"step={options.step!r} is of use only for a rule that makes up for "
            "missed steps, such as AdamRule(catch_up=True)"
        )
    plan = inputs.plan
    if plan is not None and (plan.num_rows, plan.ids.shape) != (num_rows, (num_ids,)):
        raise ValueError(
            f"plan is for {plan.ids.size} ids of {plan.num_rows} rows, but there are "
            f"{num_ids} ids and {num_rows} rows: pass plan_update(ids, {num_rows})"
        )
    return UpdateSpec(
        rule=rule,
        limits=options.limits(),
        layout=layout,
        num_ids=num_ids,
        num_grads=num_grads,
        grads_dtype=grads_dtype,
        weighted=inputs.sample_ids is not None or inputs.gains is not None,
        lazy=options.lazy,
        accumulate=options.use_gradient_accumulation,
        decays=options.decays,
        scales=options.scales,
        stochastic=options.rounding == "stochastic" and BFLOAT16 in layout.dtypes,
    )


def plain_layout(state: Sequence[Any], rule: UpdateRule) -> PlainLayout:
    """Returns the layout of a table and its slots, which are arrays.

    Raises:
        TypeError: an array of another dtype, or something else than an array.
        ValueError: another number of arrays than the rule has, or another shape.
    """
    slots = rule.slots
    names = ("table", *(slot.name for slot in slots))
    if len(state) != len(names):
        raise ValueError(
            f"the state has {len(state)} arrays, but {type(rule).__name__} has "
            f"{len(names)}, {names}: pass (table, *initial_slots(rule, table.shape, "
            "jnp.float32))"
        )
    shape, dtype = _stored("table", state[0])
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"table.shape={shape} must be (V, D), both at least 1")
    dtypes = [dtype]
    for slot, array in zip(slots, state[1:], strict=True):
        own, dtype = _stored(slot.name, array)
        if slot.per == "row":
            if own != shape[:1] or dtype != FLOAT32:
                raise ValueError(
                    f"{slot.name} of {dtype}{list(own)} must be float32[{shape[0]}]: "
                    "this slot has one number for each row"
                )
        elif own != shape:
            raise ValueError(
                f"{slot.name}.shape={own} must be table.shape={shape}: this slot has "
                "one number for each weight"
            )
        dtypes.append(dtype)
    per_row = (False, *(slot.per == "row" for slot in slots))
    return PlainLayout(*shape, tuple(dtypes), per_row)


def _stored(name: str, array: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not hasattr(array, "shape") and not isinstance(array, list | float | int):
        raise TypeError(
            f"{name} is a {type(array).__name__}, not an array: pass the arrays of the "
            "state one by one, as in sparse_adam_update(*state, ids, grads); of a "
            "PackedTable call packed_adam_update or sparse_update"
        )
    if not isinstance(getattr(array, "dtype", FLOAT32), np.dtype):
        raise TypeError(
            f"{name} is a {type(array).__module__}.{type(array).__name__}, no array of "
            f"JAX or NumPy: pass jnp.from_dlpack({name}) or jnp.asarray({name})"
        )
    shape, dtype = np.shape(array), np.dtype(jnp.result_type(array))
    if dtype not in STORED_DTYPES:
        raise TypeError(
            f"{name}.dtype={dtype} must be float32 or bfloat16: pass "
            f"{name}.astype(jnp.float32)"
        )
    return shape, dtype


def _same_shape(name: str, shape: tuple[int, ...], ids_shape: tuple[int, ...]) -> None:
    if shape != ids_shape:
        raise ValueError(
            f"{name}.shape={shape} must be ids.shape={ids_shape}: one for each id"
        )
