"""Runs a row kernel, under its own name and with a config, beside the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam import plan_update, reference
from sparse_adam.ops.plan import indices_or
from tests import cases, helpers

RATE = 0.01


@functools.cache
def _jitted(update, problem, config):
    return jax.jit(functools.partial(update, problem=problem, config=config))


def run_kernel(update, run, arrays, case, config):
    """The kernel's result for a case, and the reference's."""
    state, ids, grads, weights = arrays
    problem = helpers.problem(case, arrays)
    plan = plan_update(ids, problem.num_rows)
    sources, gains = plan.order, None
    if weights:
        samples = indices_or(weights["sample_ids"], problem.num_grads, fill=-1)
        sources, gains = samples[plan.order], weights["gains"][plan.order]
    operands = (*state, grads, plan.ids, sources, gains, jnp.float32(RATE))
    new = run(_jitted(update, problem, config), *operands)
    expected = reference.sparse_adam_update(
        *(*state, ids, grads), learning_rate=RATE, **weights, **case.options
    )
    return new, expected


def check_kernel(update, run, case, ids, config):
    arrays = cases.arrays(case)
    if ids is not None:
        arrays = arrays._replace(ids=np.asarray(ids, np.int32))
    new, expected = run_kernel(update, run, arrays, case, config)
    helpers.assert_close_states(new, arrays.state, expected, learning_rate=RATE)
    touched = np.isin(np.arange(case.num_rows), arrays.ids)
    for x, old in zip(new, arrays.state, strict=True):
        helpers.assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])
