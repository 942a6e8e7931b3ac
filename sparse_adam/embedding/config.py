"""What a user says about tables and features: values, checked once, never changed."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from sparse_adam._types import Combiner
from sparse_adam.embedding.optimizer import Optimizer, accepts
from sparse_adam.ops.validate import STORED_DTYPES
from sparse_adam.rules import numbers

COMBINERS = ("mean", "sum", "sqrtn")
MAX_ROWS = 2**31 - 2


class _ShowsWhatIsSet:
    """A dataclass whose repr leaves out the arguments at their defaults."""

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) is not field.default
            and value != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizationConfig(_ShowsWhatIsSet):
    r"""Simulates in the forward pass that a table is stored in few bits.

    A looked-up weight :math:`x` becomes the nearest of `num_buckets` values that
    divide `[lower, upper]` evenly,

    .. math::

        q = \frac{\mathtt{upper} - \mathtt{lower}}{\mathtt{num\_buckets} - 1}, \qquad
        x \leftarrow \left\lfloor \frac{\mathrm{clip}(x) - \mathtt{lower}}{q}
            + \frac12 \right\rfloor q + \mathtt{lower}

    before rows are combined. The gradient passes straight through, also where the
    weight was clipped; the table itself stays as it is.

    Args:
        num_buckets: how many values; at least 2.
        lower: the smallest value.
        upper: the largest value; above `lower`.

    Raises:
        ValueError: one of these does not hold.

    Examples:
        >>> QuantizationConfig(num_buckets=256, lower=-1.0, upper=1.0)
        QuantizationConfig(num_buckets=256, lower=-1.0, upper=1.0)
    """

    num_buckets: int
    lower: float
    upper: float

    def __post_init__(self) -> None:
        if not is_int(self.num_buckets) or self.num_buckets < 2:
            raise ValueError(
                f"num_buckets={self.num_buckets!r} must be an int and at least 2: one "
                "for each end of the range"
            )
        bounds = (self.lower, self.upper)
        if not all(_is_finite(bound) for bound in bounds) or self.lower >= self.upper:
            raise ValueError(
                f"lower={self.lower!r} and upper={self.upper!r} must be finite numbers "
                "with lower < upper"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class TableConfig(_ShowsWhatIsSet):
    """One embedding table.

    Features that are given the *same object* share the table, as in TensorFlow. Two
    configurations with equal values are equal and hash alike, but are two tables.

    Args:
        vocabulary_size: V, the number of rows, below 2**31 - 1; ids are in `[0, V)`.
            If rows are to be spread over devices, a multiple of their number; of tables
            that share an array, its rows must be (`EmbeddingLayout.stacks`).
        dim: D, the width of a row.
        initializer: `(key, shape, dtype) -> array`, as those of
            `jax.nn.initializers`, called with `(V, D)` and `dtype`. What it returns is
            copied. None is a normal distribution of standard deviation `1/sqrt(dim)`,
            cut off at two of them.
        optimizer: the table's own, in place of the global one; or None.
        combiner: how the rows of one sample become one: "mean", "sum" or "sqrtn".
        name: for checkpoints, rates and messages; unique among the tables. None
            becomes `table_{i}` for the i-th table of the features, from 0.
        quantization_config: simulates stored bits in the forward pass; or None.
        dtype: of the weights: float32 or bfloat16. Let a bfloat16 table round
            stochastically (`apply_gradients`), or it loses small updates.
        slot_dtype: of the slots: float32 or bfloat16.
        trainable: False freezes the table: it has no slots, no optimizer and no
            gradient, and updates leave it as it is.

    Raises:
        TypeError: `trainable` is not True or False.
        ValueError: an argument is not what it must be.

    Examples:
        >>> TableConfig(vocabulary_size=8, dim=4, name="video")
        TableConfig(vocabulary_size=8, dim=4, name='video')
        >>> TableConfig(8, 4) == TableConfig(8, 4)
        True

    Source: `tf.tpu.experimental.embedding.TableConfig`.
    """

    vocabulary_size: int
    dim: int
    initializer: Callable[..., jax.Array] | None = None
    optimizer: Optimizer | None = None
    combiner: Combiner = "mean"
    name: str | None = None
    quantization_config: QuantizationConfig | None = None
    dtype: DTypeLike = np.float32
    slot_dtype: DTypeLike = np.float32
    trainable: bool = True

    def __post_init__(self) -> None:
        for argument, what in (("vocabulary_size", "rows"), ("dim", "numbers a row")):
            value = getattr(self, argument)
            if not is_int(value) or value < 1:
                raise ValueError(
                    f"{argument}={value!r} must be an int and at least 1: it counts "
                    f"{what}"
                )
            object.__setattr__(self, argument, int(value))
        if self.vocabulary_size > MAX_ROWS:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size} of table {self.name!r} must "
                f"be at most {MAX_ROWS}, since ids are int32 in the update: split the "
                "table"
            )
        initializer = self.initializer
        if initializer is not None and not (
            callable(initializer) and accepts(initializer, 3)
        ):
            raise ValueError(
                f"initializer={initializer!r} must be a callable (key, shape, "
                "dtype) -> array, as those of jax.nn.initializers, or None; of one of "
                "TensorFlow's, (shape, dtype), make lambda key, shape, dtype: "
                "initializer(shape, dtype)"
            )
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
        if self.combiner not in COMBINERS:
            raise ValueError(f"combiner={self.combiner!r} must be one of {COMBINERS}")
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r} must be a string, or None")
        quantization = self.quantization_config
        if quantization is not None and not isinstance(
            quantization, QuantizationConfig
        ):
            raise ValueError(
                f"quantization_config={quantization!r} must be a QuantizationConfig, "
                "or None"
            )
        trainable = numbers.flag("trainable", self.trainable)
        object.__setattr__(self, "trainable", trainable)
        for argument in ("dtype", "slot_dtype"):
            object.__setattr__(self, argument, _stored_dtype(self, argument))

    def initialize(self, key: jax.Array, name: str) -> ArrayLike:
        """Returns new weights `[V, D]` of the table that is called `name`.

        Raises:
            TypeError: the initializer returned another dtype. float64, NumPy's own, is
                rounded.
            ValueError: it returned another shape.
        """
        shape = (self.vocabulary_size, self.dim)
        initializer = self.initializer or jax.nn.initializers.truncated_normal(
            1 / math.sqrt(self.dim)
        )
        weights = initializer(key, shape, self.dtype)
        if np.shape(weights) != shape:
            raise ValueError(
                f"initializer={initializer!r} of table {name!r} returned the shape "
                f"{np.shape(weights)}; it must be (V, D) = {shape}"
            )
        dtype = np.dtype(jnp.result_type(weights))
        if getattr(weights, "dtype", dtype) == np.float64:
            # Of NumPy on the host: on a device there may be no room for all of it.
            xp = np if isinstance(weights, np.ndarray) else jnp
            return xp.asarray(weights, self.dtype)
        if dtype != self.dtype:
            raise TypeError(
                f"initializer={initializer!r} of table {name!r} returned {dtype=!s}; "
                f"it must be {self.dtype}, as it was called with: return "
                "weights.astype(dtype), or pass TableConfig(dtype=jnp.bfloat16) for a "
                "bfloat16 table"
            )
        return weights


@dataclasses.dataclass(frozen=True, repr=False)
class FeatureConfig(_ShowsWhatIsSet):
    """One feature: which table it is looked up in, and as what it comes out.

    Args:
        table: the table; features with the same `TableConfig` object share it.
        max_sequence_length: 0 combines a sample's rows into one. L > 0 keeps them as a
            sequence `[..., L, D]`: longer ones are cut off, shorter ones filled with
            zeros; the table's combiner is not used.
        validate_weights_and_indices: in `serving_embedding_lookup` of sparse ids, True
            drops those with a weight <= 0, unless the combiner is "sum". Ids outside
            the table are ignored always.
        output_shape: the shape of the activations without their last axis D, or None
            for that of the input. Where it holds k times the samples of a ragged,
            sparse or padded input, they come out as sequences of length k.
        name: for messages; None is the feature's place in the structure.

    Raises:
        ValueError: an argument is not what it must be.

    Examples:
        >>> video = TableConfig(8, 4, name="video")
        >>> FeatureConfig(video, max_sequence_length=3)
        FeatureConfig(table=TableConfig(vocabulary_size=8, dim=4, name='video'), \
max_sequence_length=3)

    Source: `tf.tpu.experimental.embedding.FeatureConfig`.
    """

    table: TableConfig
    max_sequence_length: int = 0
    validate_weights_and_indices: bool = True
    output_shape: Sequence[int] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.table, TableConfig):
            raise ValueError(f"table={self.table!r} must be a TableConfig")
        if not is_int(self.max_sequence_length) or self.max_sequence_length < 0:
            raise ValueError(
                f"max_sequence_length={self.max_sequence_length!r} must be an int and "
                "at least 0; 0 is no sequence"
            )
        if not isinstance(self.validate_weights_and_indices, bool):
            raise ValueError(
                f"validate_weights_and_indices={self.validate_weights_and_indices!r} "
                "must be True or False"
            )
        if self.output_shape is not None:
            is_shape = isinstance(self.output_shape, Sequence)
            shape = tuple(self.output_shape) if is_shape else ()
            if not is_shape or not all(is_int(size) and size >= 1 for size in shape):
                raise ValueError(
                    f"output_shape={self.output_shape!r} must be a tuple of ints >= 1, "
                    "without the last axis D; or None"
                )
            object.__setattr__(self, "output_shape", tuple(int(n) for n in shape))
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r} must be a string, or None")


def check_optimizer(optimizer: Any) -> None:
    """Checks that it is one.

    Raises:
        ValueError: it is not.
    """
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} must be an optimizer of this package, such as "
            "Adam(0.1)"
        )


def _stored_dtype(config: TableConfig, argument: str) -> np.dtype:
    value = getattr(config, argument)
    for dtype in STORED_DTYPES:
        with contextlib.suppress(TypeError):
            if value is not None and np.dtype(value) == dtype:
                return dtype
    raise ValueError(
        f"{argument}={value!r} of table {config.name!r} must be jnp.float32 or "
        "jnp.bfloat16"
    )


def is_int(value: Any) -> bool:
    """Tells an int, Python's or NumPy's, which a bool is not here."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating)
    return is_number and not isinstance(value, bool) and math.isfinite(value)
