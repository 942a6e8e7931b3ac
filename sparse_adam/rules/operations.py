"""The operations of a step: which ones kernels can compute, and whether they mix rows.

A step is looked at as a jaxpr, traced with a tile of `ROWS` rows. The first axis of
every array that is not a scalar is that of the rows, and must stay so: elementwise
operations keep it, and the few others that are allowed are looked at one by one.

The tables hold what Pallas of jax 0.10 lowers and libtpu then compiles.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

ROWS = 3  # of the tile that a step is traced with; unlike its number of lanes


def _names(text: str) -> frozenset[str]:
    """Returns the names of a text."""
    return frozenset(text.split())


ELEMENTWISE = _names(
    "abs add and bitcast_convert_type ceil clamp convert_element_type cos div eq erf "
    "exp exp2 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul "
    "ne neg nextafter not or pow rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub "
    "tan tanh xor"
)
REDUCTIONS = _names("reduce_sum reduce_max reduce_min reduce_and reduce_or")
# Operations that call a function; it is looked into.
CALLS = _names("jit pjit custom_jvp_call custom_vjp_call")
TRANSCENDENTALS = _names(
    "cos erf exp exp2 log log1p logistic pow rsqrt sin sqrt tan tanh"
)
# What a vector subcore of a SparseCore has, of vectors; and of these, not of scalars.
SUBCORE = _names(
    "abs add and bitcast_convert_type broadcast_in_dim clamp convert_element_type div "
    "eq exp ge gt jit le lt max min mul ne neg not or pjit rem rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sqrt sub xor"
)
SUBCORE_VECTORS = _names("div exp rem rsqrt sqrt")
_DTYPES = tuple(np.dtype(name) for name in ("float32", "int32", "uint32", "bool"))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, and those of the functions that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        inner = called(eqn)
        if inner is not None:
            yield from equations(inner)


def captured(jaxpr: Any) -> list[str]:
    """Returns the types of arrays that a jaxpr, or one it calls, has from elsewhere."""
    inner = (called(eqn) for eqn in equations(jaxpr))
    return [
        f"{variable.aval.dtype}{list(variable.aval.shape)}"
        for one in (jaxpr, *filter(None, inner))
        for variable in one.constvars
    ]


def called(eqn: Any) -> Any | None:
    """Returns the jaxpr that an equation calls, or None if it calls none we know."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    return getattr(inner, "jaxpr", inner)


def objection(eqn: Any) -> str | None:
    """Returns why no kernel could run an equation, or None; a clause after "it"."""
    name = eqn.primitive.name
    for variable in eqn.outvars:
        dtype = getattr(variable.aval, "dtype", None)
        if dtype not in _DTYPES:
            return (
                f"makes a {dtype} by `{name}`: kernels compute in "
                "float32, with int32, uint32 and bool beside it"
            )
    if name in CALLS and called(eqn) is not None:
        return None
    if name == "pow" and not eqn.outvars[0].aval.shape:
        return "takes a power of a scalar: use jnp.sqrt, or jnp.exp and jnp.log"
    if name in ELEMENTWISE:
        return None
    if name in REDUCTIONS:
        operand = eqn.invars[0].aval
        axes = tuple(eqn.params["axes"])
        if operand.shape[:1] == (ROWS,) and operand.ndim == 2 and axes == (1,):
            return None
        return (
            f"reduces over axes {axes} of an array of shape {operand.shape} where the "
            f"tile has {ROWS} rows: a rule may only reduce over the last axis of a "
            "tile, within a row, as in jnp.sum(x, axis=-1, keepdims=True)"
        )
    moves = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")
    if name in moves and _keeps_rows(eqn):
        return None
    return (
        f"uses `{name}`, which may bring numbers of one row into another, or which "
        "some kernel cannot compute: use arithmetic, comparisons, jnp.where, roots, "
        "exp, log, powers, and sums, maxima and minima over the last axis"
    )


def beyond_subcore(eqn: Any) -> str | None:
    """Names what an equation needs that a vector subcore has not, or returns None."""
    name = eqn.primitive.name
    if name not in SUBCORE:
        return name
    if name in SUBCORE_VECTORS and not eqn.outvars[0].aval.shape:
        return f"{name} of a scalar"
    if name == "convert_element_type":
        dtypes = {np.dtype(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)}
        if dtypes == {np.dtype(np.float32), np.dtype(np.uint32)}:
            return f"{name} between float32 and uint32"
    return None


def fingerprint(jaxpr: Any) -> list[Any]:
    """Returns what a jaxpr computes, but for the shapes: operations and constants."""
    found = []
    for eqn in equations(jaxpr):
        literals = [repr(v.val) for v in eqn.invars if hasattr(v, "val")]
        numbers = [
            (key, value)
            for key, value in sorted(eqn.params.items())
            if isinstance(value, int | float | str | np.dtype)
        ]
        found.append((eqn.primitive.name, literals, numbers))
    return found


def _keeps_rows(eqn: Any) -> bool:
    """Tells whether a change of shape leaves the first axis what it is."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if all(size == 1 for size in before):
        return True
    if eqn.primitive.name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"]
        return before[0] in (1, ROWS) and place[0] == 0 and len(after) == 2
    return before[0] == ROWS and after[:1] == (ROWS,)
