"""An update of the arrays at hand: of one device, or of several by the whole batch."""

from typing import Any

from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.spec import State, UpdateSpec
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.ops.run import canonicalize, run_update
from sparse_adam.ops.shards import Shards, vary_alike
from sparse_adam.rules import UpdateRule


def update_arrays(
    arrays: State,
    inputs: UpdateInputs,
    rule: UpdateRule,
    options: UpdateOptions,
    layout: Layout,
) -> State:
    """Updates what this device has: the arrays of a layout, by its own batch."""
    spec = validate.update_spec(layout, inputs, rule, options)
    return update_all(arrays, inputs, spec, options, None)


def update_all(
    arrays: State,
    inputs: UpdateInputs,
    spec: UpdateSpec,
    options: UpdateOptions,
    shards: Shards | None,
) -> State:
    """Updates arrays by a batch that every device has whole.

    Args:
        arrays: of the layout.
        inputs: the batch.
        spec: of the whole update.
        options: of the update.
        shards: the devices that share the rows; None is one device.
    """
    own: Any = spec
    if shards is not None:
        own = spec.replace(layout=spec.layout.divided(shards.count))
    chosen = dispatch.choices(own, options.implementation, options.config)
    if not spec.num_ids and spec.lazy:
        return arrays
    scalars = options.scalars(spec.layout, stochastic=spec.stochastic)
    arrays, batch, scalars = vary_alike((arrays, canonicalize(inputs, spec), scalars))
    return run_update(arrays, batch, scalars, spec=own, chosen=chosen, shards=shards)
