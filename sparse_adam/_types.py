"""Shapes as types, by the field's names: V rows, D lanes, N occurrences of ids.

jaxtyping writes them and the tests check them at run time. It is not a dependency:
without it each alias is just `jax.Array`.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax

# What users say by a word.
Combiner: TypeAlias = Literal["mean", "sum", "sqrtn"]
ImplementationName: TypeAlias = Literal[
    "sparsecore", "tensorcore", "sweep", "cpu", "xla"
]
Rounding: TypeAlias = Literal["nearest", "stochastic"]
Storage: TypeAlias = Literal["plain", "packed"]

# Inside of a kernel a ref; outside of it an array, or what to allocate.
Operand: TypeAlias = Any
Operands: TypeAlias = tuple[Operand, ...]
# A number of a row, a block or a place: static or traced.
Index: TypeAlias = int | jax.Array

if TYPE_CHECKING:
    Ref: TypeAlias = jax.Ref
    Table: TypeAlias = jax.Array
    Grads: TypeAlias = jax.Array
    Indices: TypeAlias = jax.Array
    Gains: TypeAlias = jax.Array
    Rate: TypeAlias = jax.Array
    StepVector: TypeAlias = jax.Array
    Seeds: TypeAlias = jax.Array
    Tile: TypeAlias = jax.Array
else:
    # A slice of a ref is of a class of its own, which is not public.
    Ref = Any
    try:
        from jaxtyping import Array, Float, Float32, Int32
    except ModuleNotFoundError:
        Table = Grads = Indices = Gains = Rate = StepVector = Seeds = Tile = jax.Array
    else:
        Table = Float[Array, "V D"]
        Grads = Float[Array, "B D"]
        Indices = Int32[Array, " N"]
        Gains = Float32[Array, " N"]
        Rate = Float32[Array, ""]
        StepVector = Float32[Array, " numbers"]
        Seeds = Int32[Array, " arrays"]
        Tile = Float32[Array, "*rows lanes"]
