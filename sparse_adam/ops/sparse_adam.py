"""Adam on sparse rows: the op that this package is named for."""

from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding
from sparse_adam.ops.dispatch import Config
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.packed import PackedTable
from sparse_adam.ops.plan import UpdatePlan
from sparse_adam.ops.sparse_update import update_state
from sparse_adam.rules import AdamRule, numbers


class AdamState(NamedTuple):
    """An embedding table and its two Adam slots, three arrays of one shape."""

    table: jax.Array  # [V, D]
    momenta: jax.Array  # [V, D], first moment m
    velocities: jax.Array  # [V, D], second moment v


def sparse_adam_update(
    table: ArrayLike,
    momenta: ArrayLike,
    velocities: ArrayLike,
    ids: ArrayLike,
    grads: ArrayLike,
    *,
    learning_rate: ArrayLike = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    lazy_adam: bool = True,
    sum_inside_sqrt: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: float | None = None,
    clip_weight_max: float | None = None,
    weight_decay_factor: ArrayLike | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: float | tuple[float | None, float | None] | None = None,
    sample_ids: ArrayLike | None = None,
    gains: ArrayLike | None = None,
    plan: UpdatePlan | None = None,
    gradient_scale: ArrayLike | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    implementation: ImplementationName | None = None,
    config: Config | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> AdamState:
    r"""Updates the rows of an embedding table that a batch looked up, with Adam.

    For each row :math:`r` that occurs in `ids`, with :math:`G` the sum of the
    gradients of all its occurrences:

    .. math::

        G &\leftarrow \mathrm{clip}(G, \mathtt{clipvalue}) \\
        w &\leftarrow w - \lambda w \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) G \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) G^2 \\
        w &\leftarrow w - \eta\, m / \sqrt{v + \epsilon^2} \\
        w &\leftarrow \mathrm{clip}(w, \mathtt{clip\_weight\_min},
                                       \mathtt{clip\_weight\_max})

    with :math:`m / (\sqrt{v} + \epsilon)` in the fifth line if `sum_inside_sqrt` is
    False. A row that occurs is updated also where its gradient is exactly 0; a row
    that does not occur comes back bit for bit (unless `lazy_adam=False`).

    There is **no bias correction and no step counter**, as on a TPU in TensorFlow;
    pass `bias_corrected_learning_rate(...)` as the rate to have it.

    The sums and the update are float32; each array is rounded to its own dtype once.
    Donate the three arrays (``jax.jit(..., donate_argnums=(0, 1, 2))``) and no
    table-sized copy is made. Rows may be spread over the devices of a mesh: each
    device updates its own (docs/sharding.md).

    Args:
        table: `[V, D]` weights w, float32 or bfloat16.
        momenta: `[V, D]` first moments m, float32 or bfloat16, zero at the start.
        velocities: `[V, D]` second moments v, float32 or bfloat16, zero at the start.
        ids: `[...]`, any integer dtype: the rows looked up; N in all. An id that is
            negative or >= V is padding: ignored, whatever its gradient.
        grads: `ids.shape + (D,)`, floating: the loss's gradient by each looked-up
            row. Or `[B, D]` with `sample_ids`.
        learning_rate: :math:`\eta`; a number or a scalar array, traced or not. A new
            value never recompiles.
        beta_1: decay of the first moment, in `[0, 1)`. `1 - beta_1` is float32 too.
        beta_2: decay of the second moment, in `[0, 1)`.
        epsilon: keeps the division finite; > 0.
        lazy_adam: True updates the rows in `ids`. False updates every row of the
            table, with G = 0 (before clipping) where a row is not in `ids`.
        sum_inside_sqrt: where epsilon stands; True is faster on a TPU.
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
        sample_ids: like `ids`: occurrence i has the gradient
            `gains[i] * grads[sample_ids[i]]`. One outside `[0, B)` adds zero.
        gains: like `ids`: factor of each occurrence's gradient; None is 1.
        plan: `plan_update(ids, V)` of these very ids, made earlier.
        gradient_scale: a scalar, traced or not, that G is multiplied by before it is
            clipped: for clipping by global norm, or loss scaling. None is 1.
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

    Returns:
        `AdamState(table, momenta, velocities)`, shapes and dtypes as they came.

    Raises:
        TypeError: an argument of the wrong kind, such as float ids.
        ValueError: a shape or a number that does not fit, or an implementation that
            cannot do this update. Both are raised while tracing.

    Examples:
        >>> import jax.numpy as jnp
        >>> table = jnp.ones((4, 2))
        >>> zeros = jnp.zeros((4, 2))
        >>> ids = jnp.array([1, 3, 1, -1])
        >>> grads = jnp.array([[0.5, 1.0], [1.0, -2.0], [0.5, 0.0], [9.0, 9.0]])
        >>> state = sparse_adam_update(
        ...     table, zeros, zeros, ids, grads, learning_rate=0.1)
        >>> print(state.table.round(4))
        [[1.     1.    ]
         [0.6838 0.6838]
         [1.     1.    ]
         [0.6838 1.3162]]

    Sources: D. Kingma and J. Ba, "Adam: a method for stochastic optimization" (2014),
    without the bias correction of its algorithm 1;
    `tensorflow/core/protobuf/tpu/optimization_parameters.proto` (AdamParameters) and
    `BuildAdamOptimizerComputation` in
    `tensorflow/core/tpu/kernels/sparse_core_ops_utils.cc` for the formula.
    """
    rule = AdamRule(beta_1, beta_2, epsilon, sum_inside_sqrt)
    options = UpdateOptions(
        learning_rate,
        numbers.flag("lazy_adam", lazy_adam),
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
    )
    inputs = UpdateInputs(ids, grads, sample_ids, gains, plan)
    state = (table, momenta, velocities)
    return AdamState(*update_state(state, inputs, rule, options, sharding))


def packed_adam_update(
    packed: PackedTable,
    ids: ArrayLike,
    grads: ArrayLike,
    *,
    learning_rate: ArrayLike = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    lazy_adam: bool = True,
    sum_inside_sqrt: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: float | None = None,
    clip_weight_max: float | None = None,
    weight_decay_factor: ArrayLike | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: float | tuple[float | None, float | None] | None = None,
    sample_ids: ArrayLike | None = None,
    gains: ArrayLike | None = None,
    plan: UpdatePlan | None = None,
    gradient_scale: ArrayLike | None = None,
    rounding: Rounding = "nearest",
    key: jax.Array | None = None,
    implementation: ImplementationName | None = None,
    config: Config | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> PackedTable:
    """Updates the rows of a packed table that a batch looked up, with Adam.

    The same as `sparse_adam_update` in every respect but the storage; see there for
    the maths, the arguments and the errors. Donate the table
    (``jax.jit(..., donate_argnums=0)``) and it is updated in place.

    Examples:
        >>> import jax.numpy as jnp
        >>> table = PackedTable.pack(*[jnp.zeros((4, 2))] * 3)
        >>> ids, grads = jnp.array([1, 1]), jnp.ones((2, 2))
        >>> table = packed_adam_update(table, ids, grads, learning_rate=0.1)
        >>> print((table.unpack()[1] > 0).any(axis=1))
        [False  True False False]
    """
    rule = AdamRule(beta_1, beta_2, epsilon, sum_inside_sqrt)
    options = UpdateOptions(
        learning_rate,
        numbers.flag("lazy_adam", lazy_adam),
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
    )
    inputs = UpdateInputs(ids, grads, sample_ids, gains, plan)
    return update_state(packed, inputs, rule, options, sharding)


def bias_corrected_learning_rate(
    learning_rate: ArrayLike,
    step: ArrayLike,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
) -> jax.Array:
    r"""Returns the rate that gives the update Adam's bias correction.

    .. math:: \eta\, \sqrt{1 - \beta_2^t} \,/\, (1 - \beta_1^t)

    Args:
        learning_rate: :math:`\eta`, a number or a scalar array.
        step: t, 1 at the first update; an integer, or an integer array, traced or not.
            A traced step below 1 counts as 1.
        beta_1: as in the update.
        beta_2: as in the update.

    Returns:
        A float32 array of the shape of `step`.

    Raises:
        ValueError: `step` is below 1 and not traced; a beta is not in `[0, 1)`.

    The powers are taken by `expm1` and `log1p`, so that neither a small step with a
    beta close to 1 nor a large one loses digits. The update's epsilon is then the
    paper's "epsilon hat".

    Examples:
        >>> print(bias_corrected_learning_rate(0.1, 1).round(6))
        0.031623
        >>> print(bias_corrected_learning_rate(0.1, 100_000))
        0.1

    Source: section 2 of Kingma and Ba (2014); the comment of AdamParameters in
    TensorFlow's `optimization_parameters.proto` prescribes it for this optimizer.
    """
    if not isinstance(step, jax.core.Tracer) and np.any(np.asarray(step) < 1):
        raise ValueError(f"{step=} must be at least 1: the first update is step 1")
    t = jnp.maximum(jnp.asarray(step, jnp.float32), 1)

    def one_minus_power(beta: float) -> jax.Array:
        with np.errstate(divide="ignore"):  # beta = 0: a power of exactly 0
            log_beta = np.log1p(-(1 - np.float64(beta)))
        return -jnp.expm1(t * np.float32(log_beta))

    correction = jnp.sqrt(one_minus_power(numbers.beta("beta_2", beta_2)))
    correction /= one_minus_power(numbers.beta("beta_1", beta_1))
    return numbers.scalar("learning_rate", learning_rate) * correction
