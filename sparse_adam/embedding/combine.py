"""Between ids and rows: how a sample's rows are combined, and gradients handed back.

Both directions share one factor for each id, its gain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_adam.embedding.config import TableConfig
from sparse_adam.embedding.occurrences import Occurrences
from sparse_adam.embedding.quantization import simulate_quantization
from sparse_adam.embedding.stored import combined_rows
from sparse_adam.embedding.stored import rows as stored_rows
from sparse_adam.ops.combine import Samples, combine_rows


def gains(part: Occurrences, combiner: str) -> jax.Array | None:
    """Returns float32 `[N]`: the factor of each id's row; None for 1 throughout.

    That is w, w / sum(w) or w / sqrt(sum(w**2)), the sums over the sample's ids. A sum
    of 0 makes it 0.
    """
    return _samples(part, combiner).factors()


def combine(
    stored: Any, part: Occurrences, config: TableConfig, *, quantize: bool
) -> jax.Array:
    """Returns the activations of one feature, `[*part.shape, D]`."""
    samples = _samples(part, config.combiner)
    size, ascending = part.num_samples, part.ascending
    if quantize and config.quantization_config is not None:
        found = stored_rows(stored, part.ids)
        rows = simulate_quantization(
            found.astype(jnp.float32), config.quantization_config
        )
        combined = combine_rows(rows, samples, size, ascending=ascending)
        combined = combined.astype(found.dtype)
    else:
        combined = combined_rows(stored, samples, size, ascending=ascending)
    return combined.reshape(*part.shape, config.dim)


def _samples(part: Occurrences, combiner: str) -> Samples:
    """Returns the ids with their weights as gains, and the combiner as scales.

    A scale is 1, 1 / sum(w) or 1 / sqrt(sum(w**2)); a sum of 0 makes it 0.
    """
    there = part.ids >= 0
    weights = part.weights
    if weights is not None:
        weights = jnp.where(there, weights, 0)
    samples = Samples(part.ids, part.samples, weights, None)
    alone = part.is_sequence or (part.samples is None and part.places == 1)
    if combiner == "sum" or (weights is None and alone):
        return samples
    if weights is None:
        weights = there.astype(jnp.float32)
    if combiner == "mean":
        divisor = part.sum(weights)
    else:
        divisor = jnp.sqrt(part.sum(weights**2))
    is_zero = divisor == 0
    return samples._replace(
        scales=jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, divisor))
    )


class TableBatch(NamedTuple):
    """What one update of one table takes, from all of its features."""

    ids: jax.Array  # [N]
    grads: jax.Array  # [B, D]
    sample_ids: jax.Array | None  # [N]; None where id i has the gradient i
    gains: jax.Array | None  # [N]


def gather_batch(
    parts: Sequence[Occurrences],
    gradients: Sequence[jax.Array | None],
    config: TableConfig,
) -> TableBatch:
    """Puts the features of one table behind one another: their ids and their samples.

    A gradient that is None is one of zeros; its ids get a sample that does not exist.
    """
    given = [g.reshape(-1, config.dim) for g in gradients if g is not None]
    if len({g.dtype for g in given}) > 1:
        given = [g.astype(jnp.float32) for g in given]
    if not sum(g.shape[0] for g in given):
        given = [jnp.zeros((1, config.dim), jnp.float32)]
    grads = _join(given)
    ids = _join([part.ids for part in parts])
    factors = [gains(part, config.combiner) for part in parts]
    joined_gains = None
    if any(factor is not None for factor in factors):
        joined_gains = _join(
            [
                jnp.ones(part.ids.shape, jnp.float32) if factor is None else factor
                for part, factor in zip(parts, factors, strict=True)
            ]
        )
    one_each = all(part.samples is None and part.places == 1 for part in parts)
    if one_each and ids.size and all(gradient is not None for gradient in gradients):
        return TableBatch(ids, grads, None, joined_gains)
    sample_ids, start = [], 0
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is None:
            sample_ids.append(jnp.full_like(part.ids, -1))
        else:
            sample_ids.append(part.owners() + start)
            start += part.num_samples
    return TableBatch(ids, grads, _join(sample_ids), joined_gains)


def _join(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
