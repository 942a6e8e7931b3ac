"""The op for every rule: validate, choose, canonicalize, run."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding
from sparse_adam.kernels.spec import State
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.packed import PackedTable, packed_layout
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.routed import Routed
from sparse_adam.ops.routed_update import update_routed
from sparse_adam.ops.shards import Shards, check_alike, known_sharding
from sparse_adam.ops.update import update_all
from sparse_adam.rules import UpdateRule, check_rule

_Stored = TypeVar("_Stored", tuple[jax.Array, ...], PackedTable)


def sparse_update(
    state: _Stored,
    ids: ArrayLike,
    grads: ArrayLike,
    rule: UpdateRule,
    *,
    learning_rate: ArrayLike,
    lazy: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: float | None = None,
    clip_weight_max: float | None = None,
    weight_decay_factor: ArrayLike | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: float | tuple[float | None, float | None] | None = None,
    gradient_scale: ArrayLike | None = None,
    sample_ids: ArrayLike | None = None,
    gains: ArrayLike | None = None,
    plan: UpdatePlan | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    implementation: ImplementationName | None = None,
    config: dispatch.Config | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
    step: ArrayLike | None = None,
) -> _Stored:
    r"""Updates the rows of an embedding table that a batch looked up, by any rule.

    For each row :math:`r` that occurs in `ids`, with :math:`G` the sum of the
    gradients of all its occurrences:

    .. math::

        G &\leftarrow \mathrm{clip}(s\,G, \mathtt{clipvalue}) \\
        w &\leftarrow w - \lambda w \\
        w, \mathrm{slots} &\leftarrow \mathtt{rule.step}((w, \mathrm{slots}), G, \eta)\\
        w &\leftarrow \mathrm{clip}(w, \mathtt{clip\_weight\_min},
                                       \mathtt{clip\_weight\_max})

    A row that occurs is updated also where its gradient is exactly 0; a row that does
    not occur comes back bit for bit (unless `lazy=False`). The sums and the step are
    float32; each array is rounded to its own dtype once. Donate the state and no
    table-sized copy is made. Rows may be spread over the devices of a mesh: each
    device updates its own (docs/sharding.md).

    Args:
        state: `(table, *slots)`: `[V, D]` weights and each slot of the rule, `[V, D]`
            or `[V]`; or a `PackedTable` of them. float32 or bfloat16 each.
        ids: `[...]`, any integer dtype: the rows looked up; N in all. An id that is
            negative or >= V is padding: ignored, whatever its gradient.
        grads: `ids.shape + (D,)`, floating: the loss's gradient by each looked-up
            row. Or `[B, D]` with `sample_ids`.
        rule: what a step of a row computes: `AdamRule()`, `SGDRule()`, `AdagradRule()`,
            `AdagradMomentumRule()`, `RowWiseAdagradRule()`, `FTRLRule()`, or one of
            your own (docs/rules.md).
        learning_rate: :math:`\eta`; a number or a scalar array, traced or not. A new
            value never recompiles.
        lazy: True updates the rows in `ids`. False updates every row of the table, with
            G = 0 (before clipping) where a row is not in `ids`.
        use_gradient_accumulation: False makes one step for each occurrence, in the
            order of `ids`, instead of one for their sum.
        clip_weight_min: lower bound of updated weights; None is none.
        clip_weight_max: upper bound of updated weights; None is none.
        weight_decay_factor: :math:`\lambda`, decoupled and before the step, traced or
            not; None is 0.
        multiply_weight_decay_factor_by_learning_rate: True makes it
            :math:`\lambda\eta`.
        clipvalue: bounds of G: `x` for `(-x, x)`, or `(low, high)` with None for an
            open side.
        gradient_scale: :math:`s`, a scalar, traced or not, that G is multiplied by
            before it is clipped: for clipping by global norm, or loss scaling.
        sample_ids: like `ids`: occurrence i has the gradient
            `gains[i] * grads[sample_ids[i]]`. One outside `[0, B)` adds zero.
        gains: like `ids`: factor of each occurrence's gradient; None is 1.
        plan: `plan_update(ids, V)` of these very ids, made earlier.
        rounding: how bfloat16 arrays are rounded: "nearest", to which an update of less
            than half a unit in the last place is lost, or "stochastic", which keeps it
            on average.
        key: of `jax.random`, for stochastic rounding. A new one for each update, such
            as `jax.random.fold_in(key, step)`; the same one gives the same bits.
        implementation: "sparsecore", "tensorcore" or "sweep" (Pallas kernels; off a TPU
            they run interpreted, slowly), "cpu" (C++; on a CPU only), "xla" (portable),
            or None: the best that compiles where this runs. `explain` tells which and
            why.
        config: block sizes of the kernel to run, instead of those chosen for it; also
            names the implementation.
        sharding: how the rows of the table are spread, a `NamedSharding`, or a
            `PartitionSpec` of the mesh in scope. Under `jax.jit` over automatic axes,
            those of `jax.sharding.Mesh`, TPUs need it, and with it the batch is routed.
            In a `jax.shard_map` the table is then what the device has of it, and ids
            are rows of the whole table, of the device's own batch (docs/sharding.md).
        step: the number of this update, from 1, traced or not: for a rule with
            `catch_up=True`, and only there. Exact up to 2**24.

    Returns:
        The state, of the type, the shapes and the dtypes that came.

    Raises:
        TypeError: an argument of the wrong kind, such as float ids.
        ValueError: a shape or a number that does not fit, or an implementation that
            cannot do this update. Both are raised while tracing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from sparse_adam.rules import AdagradRule, initial_slots
        >>> rule, table = AdagradRule(initial_accumulator_value=0.25), jnp.ones((4, 2))
        >>> state = (table, *initial_slots(rule, table.shape, table.dtype))
        >>> ids, grads = jnp.array([1, -1]), jnp.ones((2, 2))
        >>> table, accumulators = sparse_update(
        ...     state, ids, grads, rule, learning_rate=0.1)
        >>> print(table[:2].round(4), accumulators[:2, 0])
        [[1.     1.    ]
         [0.9106 0.9106]] [0.25 1.25]

    Source: the order of what wraps a rule is that of TensorFlow's
    `optimization_parameters.proto`.
    """
    options = UpdateOptions(
        learning_rate,
        lazy,
        use_gradient_accumulation,
        clip_weight_min,
        clip_weight_max,
        weight_decay_factor,
        multiply_weight_decay_factor_by_learning_rate,
        clipvalue,
        gradient_scale,
        rounding,
        key,
        implementation,
        config,
        step,
    )
    inputs = UpdateInputs(ids, grads, sample_ids, gains, plan)
    return update_state(state, inputs, rule, options, sharding)


def update_state(
    state: Any,
    inputs: UpdateInputs,
    rule: UpdateRule,
    options: UpdateOptions,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> Any:
    """Does what `sparse_update` says, with its arguments in records."""
    check_rule(rule)
    inputs = inputs.converted()
    if isinstance(state, PackedTable):
        layout, arrays = packed_layout(state, rule), (state.lines,)
    else:
        layout = validate.plain_layout(state, rule)
        arrays = tuple(map(jnp.asarray, state))
    spec = validate.update_spec(layout, inputs, rule, options)
    check_alike(spec.array_names, tuple(map(known_sharding, arrays)))
    shards = Shards.of("table", arrays[0], sharding)
    routed = Routed.of_update(shards, inputs, spec)
    if routed is None:
        new = update_all(arrays, inputs, spec, options, shards)
    else:
        new = update_routed(arrays, inputs, spec, options, routed)
    return _like(state, new)


def _like(state: Any, arrays: State) -> Any:
    """Returns arrays as the storage that they came in."""
    if isinstance(state, PackedTable):
        return PackedTable(arrays[0], state.layout)
    return arrays
