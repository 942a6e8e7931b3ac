"""What only the portable path has: two ways to sum runs."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.ops import xla


@pytest.mark.parametrize("num_ids", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("num_distinct", [1, 3, 50, 1000])
def test_a_gpus_sums_are_a_cpus(num_ids, num_distinct):
    rng = np.random.default_rng(num_ids + num_distinct)
    ids = np.sort(rng.integers(0, num_distinct, num_ids))
    is_start = np.append(True, ids[1:] != ids[:-1])
    run = np.cumsum(is_start) - 1
    # Integers, so that float32 adds them exactly in any order.
    gradients = rng.integers(-100, 100, (num_ids, 4)).astype(np.float32)
    gradients[rng.random(num_ids) < 0.05] = np.nan
    arguments = map(jnp.asarray, (gradients, is_start, run.astype(np.int32)))
    arguments = tuple(arguments)
    by_scan = xla._sums_by_scan(*arguments)
    by_scatter = xla._sums_by_scatter(*arguments)
    used = run[-1] + 1
    np.testing.assert_array_equal(by_scan[:used], by_scatter[:used])
