"""Between ids and rows: how a sample's rows are combined, and gradients handed back.

Features of one stack are joined. Those that are combined alike have one lookup, and
those of one rate have one update. A combiner's divisor belongs to a sample and not to
an id: the lookup multiplies the sums of a sample by it, and the update the gradient of
a sample.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.embedding import on_mesh
from sparse_adam.embedding.config import QuantizationConfig
from sparse_adam.embedding.occurrences import Occurrences, occurrences
from sparse_adam.embedding.quantization import simulate_quantization
from sparse_adam.embedding.stacks import Stack
from sparse_adam.embedding.stored import combined_rows
from sparse_adam.embedding.stored import rows as stored_rows
from sparse_adam.embedding.tables import EmbeddingLayout, Feature
from sparse_adam.ops.combine import Samples, combine_rows
from sparse_adam.ops.shards import explicit_sharding


class Part(NamedTuple):
    """The ids of one feature, as rows of its stack, and what becomes of them."""

    feature: Feature
    stack: int  # its number
    occurrences: Occurrences
    samples: Samples

    @classmethod
    def of(cls, layout: EmbeddingLayout, feature: Feature, ids: Occurrences) -> "Part":
        """Raises the ids of a feature, which are rows of its table, by its offset."""
        table = layout.tables[feature.table]
        number, place = layout.place(table.name)
        ids = ids.raised(layout.stacks[number].offsets[place])
        return cls(feature, number, ids, _samples(ids, table.config.combiner))

    @property
    def activations(self) -> tuple[int, ...]:
        """Returns the shape of its activations."""
        return (*self.occurrences.shape, self.feature.config.table.dim)


def parts_of(layout: EmbeddingLayout, features: Any, weights: Any) -> list[Part]:
    """Returns the ids of each feature, in the order of the flattened structure."""
    ids = layout.leaves("features", features)
    weights = (
        [None] * len(ids) if weights is None else layout.leaves("weights", weights)
    )
    return [
        Part.of(layout, feature, occurrences(feature, *own))
        for feature, *own in zip(layout.features, ids, weights, strict=True)
    ]


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


def activations_of(
    layout: EmbeddingLayout,
    stacks: Sequence[Any],
    parts: Sequence[Part],
    *,
    quantize: bool,
) -> list[jax.Array]:
    """Returns the activations of each feature.

    Features of one stack that are combined alike are looked up together.

    Args:
        layout: of the state.
        stacks: of the state, as they are stored.
        parts: the features.
        quantize: True simulates the quantization of tables that ask for it.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, part in enumerate(parts):
        kind = _kind(layout.stacks[part.stack], part, number, quantize)
        groups.setdefault(kind, []).append(number)
    found: list[Any] = [None] * len(parts)
    for numbers in groups.values():
        own = [parts[number] for number in numbers]
        quantization = own[0].feature.config.table.quantization_config
        quantization = quantization if quantize else None
        sizes = [part.occurrences.num_samples for part in own]
        stack, stored = layout.stacks[own[0].stack], stacks[own[0].stack]
        if stack.spread is not None:
            batch = [part.samples for part in own]
            rows = on_mesh.look_up(stack, stored, batch, sizes, quantization)
        else:
            combined = _combine(stored, own, quantization)
            rows = lax.split(combined, sizes) if len(own) > 1 else [combined]
        for number, part, activations in zip(numbers, own, rows, strict=True):
            found[number] = activations.reshape(part.activations)
    return found


def _kind(stack: Stack, part: Part, number: int, quantize: bool) -> Hashable:
    """Returns a value that is equal for features that can be looked up together.

    Args:
        stack: that of the feature.
        part: the feature.
        number: of the feature, which no other one has.
        quantize: as in `activations_of`.
    """
    quantization = part.feature.config.table.quantization_config if quantize else None
    if stack.spread is not None:
        return part.stack, quantization  # all features of the stack share a route
    samples, ids = part.samples, part.occurrences
    sharding = explicit_sharding(samples.ids)
    if sharding is not None and any(axis is not None for axis in sharding.spec):
        return number  # joined, ids that are spread would have to be sent
    return (
        part.stack,
        quantization,
        ids.places if samples.owners is None else ("owners", ids.ascending),
        samples.gains is None,
        samples.scales is None,
        sharding,
    )


def _combine(
    stored: Any, parts: Sequence[Part], quantization: QuantizationConfig | None
) -> jax.Array:
    """Returns the combined rows of all samples of features of one kind, `[S, D]`."""
    samples = _joined(parts)
    size = sum(part.occurrences.num_samples for part in parts)
    ascending = parts[0].occurrences.ascending
    if quantization is None:
        return combined_rows(stored, samples, size, ascending=ascending)
    found = stored_rows(stored, samples.ids)
    rows = simulate_quantization(found.astype(jnp.float32), quantization)
    combined = combine_rows(rows, samples, size, ascending=ascending)
    return combined.astype(found.dtype)


def _joined(parts: Sequence[Part]) -> Samples:
    """Returns the samples of features of one kind, one feature behind the other.

    An id without an owner is -1, so it may be given a sample of the next feature.
    """
    start, raised = 0, []
    for part in parts:
        own = part.samples
        if own.owners is not None and start:
            own = own._replace(owners=own.owners + start)
        raised.append(own)
        start += part.occurrences.num_samples
    return jax.tree.map(lambda *arrays: _join(arrays), *raised)


class UpdateBatch(NamedTuple):
    """What one update of a stack takes, from all features that are in it."""

    ids: jax.Array  # [N]
    grads: jax.Array  # [B, D]
    sample_ids: jax.Array | None  # [N]; None where id i has the gradient i
    gains: jax.Array | None  # [N]

    def gradients_of(self, occurrences: jax.Array) -> jax.Array:
        """Returns the gradients of some of the N ids: `[C, D]`, float32.

        Args:
            occurrences: int32 `[C]`, which of them; zeros for one that is not below N.
        """
        samples = occurrences
        if self.sample_ids is not None:
            samples = self.sample_ids.at[occurrences].get(mode="fill", fill_value=-1)
        samples = jnp.where(samples < 0, self.grads.shape[0], samples)
        found = self.grads.at[samples].get(mode="fill", fill_value=0)
        found = found.astype(jnp.float32)
        if self.gains is None:
            return found
        gains = self.gains.at[occurrences].get(mode="fill", fill_value=0)
        return gains[:, None] * found


def gather_batch(
    parts: Sequence[Part], gradients: Sequence[jax.Array | None]
) -> UpdateBatch:
    """Puts features of one stack behind one another: their ids and their samples.

    A gradient that is None is one of zeros; its ids get a sample that does not exist.
    """
    given = [
        _by_sample(part, gradient)
        for part, gradient in zip(parts, gradients, strict=True)
        if gradient is not None
    ]
    if len({g.dtype for g in given}) > 1:
        given = [g.astype(jnp.float32) for g in given]
    if not sum(g.shape[0] for g in given):
        given = [jnp.zeros((1, parts[0].activations[-1]), jnp.float32)]
    grads = _join(given)
    ids = _join([part.samples.ids for part in parts])
    factors = [part.samples.gains for part in parts]
    gains = None
    if any(factor is not None for factor in factors):
        gains = _join(
            [
                jnp.ones(part.samples.ids.shape, jnp.float32) if own is None else own
                for part, own in zip(parts, factors, strict=True)
            ]
        )
    one_each = all(
        part.samples.owners is None and part.occurrences.places == 1 for part in parts
    )
    if one_each and ids.size and all(gradient is not None for gradient in gradients):
        return UpdateBatch(ids, grads, None, gains)
    sample_ids, start = [], 0
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is None:
            sample_ids.append(jnp.full_like(part.samples.ids, -1))
        else:
            sample_ids.append(part.occurrences.owners() + start)
            start += part.occurrences.num_samples
    return UpdateBatch(ids, grads, _join(sample_ids), gains)


def _by_sample(part: Part, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of each sample's sum of rows, `[S, D]`."""
    gradient = gradient.reshape(-1, part.activations[-1])
    if part.samples.scales is None:
        return gradient
    return part.samples.scales[:, None] * gradient.astype(jnp.float32)


def _join(arrays: Sequence[Any]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
