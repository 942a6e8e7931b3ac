"""Calls of the update that no op makes: each is refused by an exception of Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.kernels import cpu
from tests import cases, helpers
from tests.cases import CASES

DEFAULT = CASES[0]


def call(
    grads, ids, sources, gains, numbers, seeds, state, attributes=None, in_place=True
):
    """The custom call itself, with arguments that the op would never make."""
    packed = len(state) == 1
    problem = helpers.spec(DEFAULT, cases.arrays(DEFAULT), packed)
    problem = helpers.changed(problem, num_rows=40, dim=8)
    aliases = {6 + i: i for i in range(len(state))} if in_place else None
    run = jax.ffi.ffi_call("sparse_adam_cpu", state, input_output_aliases=aliases)
    run = functools.partial(run, **cpu.attributes(problem) | (attributes or {}))
    arrays = (grads, ids, sources, gains, numbers, seeds, *state)
    return jax.block_until_ready(jax.jit(run)(*arrays))


ONES = jnp.ones((40, 8))
GOOD = {
    "grads": jnp.ones((6, 8)),
    "ids": jnp.zeros((6,), jnp.int32),
    "sources": jnp.zeros((6,), jnp.int32),
    "gains": jnp.zeros((0,), jnp.float32),
    "numbers": jnp.float32([0.1, 0, 1]),
    "seeds": jnp.zeros((0,), jnp.int32),
    "state": (ONES, ONES, ONES),
}
LINES = jnp.zeros((9, 128), jnp.int32)  # of 16 rows three


def nine_arrays():
    return {name: np.zeros(9, np.int32) for name in ("first", "encodings", "per_row")}


def encodings(*values):
    return {"encodings": np.array(values, np.int32)}


def firsts(*values):
    return {"first": np.array(values, np.int32)}


def last_per_row():
    return {"per_row": np.array([0, 0, 1], np.int32)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"state": (ONES[:, :4], ONES, ONES)}, "too small"),
        ({"state": (ONES, ONES[:, :4], ONES)}, "too small"),
        ({"state": (ONES, ONES, ONES[:39])}, "too small"),
        ({"state": (ONES, ONES, ONES.astype(jnp.float16))}, "float32 or bfloat16"),
        ({"state": (ONES, ONES, ONES.astype(jnp.bfloat16))}, "float32 or bfloat16"),
        ({"state": (ONES, ONES)}, "3 arrays, or one of lines"),
        ({"state": (LINES[:8],)}, "too small"),
        ({"state": (LINES.astype(jnp.float32),)}, "packed int32"),
        ({"state": (LINES,), "in_place": False}, "in place"),
        ({"grads": jnp.ones((6, 9))}, "stride=8 must be at least 9, or rows overlap"),
        ({"grads": jnp.ones((6, 0))}, "D=0 must be in"),
        ({"grads": jnp.ones((48,))}, "the gradients must be"),
        ({"grads": jnp.ones((6, 8), jnp.float16)}, "the gradients must be float32"),
        ({"sources": jnp.zeros((5,), jnp.int32)}, "sources must be"),
        ({"gains": jnp.ones((5,))}, "gains must be"),
        ({"seeds": jnp.zeros((2,), jnp.int32)}, "seeds must be"),
        ({"numbers": jnp.zeros((2,))}, "numbers must be"),
        ({"numbers": jnp.float32(0.1)}, "Wrong buffer rank"),
        ({"ids": jnp.zeros((6,), jnp.int16)}, "Wrong buffer dtype"),
        ({"in_place": False}, "in place"),
        ({"attributes": {"first": np.array([0, 0, -1], np.int32)}}, "too small"),
        ({"attributes": {"first": np.array([0, 1, 0], np.int32)}}, "too small"),
        ({"attributes": {"first": np.array([0, 0], np.int32)}}, "of the same 1 to 8"),
        ({"attributes": {"first": np.array([], np.int32)}}, "of the same 1 to 8"),
        ({"attributes": {"per_row": np.array([0, 0], np.int32)}}, "of the same 1 to 8"),
        ({"attributes": nine_arrays()}, "of the same 1 to 8"),
        ({"attributes": {"rule": "OtherRule"}}, "no loop for OtherRule"),
        (
            {"attributes": {"constants": np.array([1], np.float32)}},
            "AdamRule has 8 constants",
        ),
        ({"attributes": {"rule": "SGDRule"}}, "SGDRule has 0 constants"),
        (
            {"attributes": {"rule": "SGDRule", "constants": np.array([], np.float32)}},
            "not the arrays of SGDRule",
        ),
        # Adam with a count of the steps of each row.
        (
            {
                "attributes": {
                    "constants": np.array([0.9, 0.9, 1e-7, 1, 1, 0, 1, 0], np.float32)
                }
            },
            "not the arrays of AdamRule",
        ),
        (
            {"attributes": {"per_row": np.array([1, 0, 0], np.int32)}},
            "not the arrays of AdamRule",
        ),
        (
            {"state": (ONES, ONES, ONES[:39, 0]), "attributes": last_per_row()},
            r"too small for \[V\]",
        ),
        (
            {"state": (LINES,), "attributes": last_per_row()},
            "packed int32",
        ),
        ({"attributes": {"stride": np.int32(-8)}}, "stride=-8 must be at least 8"),
        ({"attributes": {"num_rows": np.int32(0)}}, "num_rows=0 must be at least 1"),
        ({"attributes": {"rows_per_group": np.int32(0)}}, "rows_per_group=0 must be"),
        ({"attributes": {"rows_per_group": np.int32(4)}}, "group_stride=0 must be"),
        (
            {"state": (LINES,), "attributes": {"group_stride": np.int32(127)}},
            "groups o",
        ),
        ({"state": (LINES,), "attributes": firsts(0, 0, 256)}, "0 of arrays 0 and 1"),
        (
            {"state": (LINES,), "attributes": firsts(0, 128, 384)},
            "384 of arrays 0 and 2",
        ),
        (
            {"state": (LINES,), "attributes": firsts(0, 0, 256) | encodings(3, 3, 0)},
            "0 of arrays 0 and 1",
        ),
        (
            {"attributes": {"num_rows": np.int32(41), "rows_per_group": np.int32(41)}},
            "too small",
        ),
        ({"attributes": encodings(0, 0, 5)}, "float32 or bfloat16"),
        ({"attributes": encodings(0, 0, 3)}, "float32 or bfloat16"),
    ],
    ids=str,
)
def test_errors_are_python_exceptions(bad, message):
    assert cpu.unsupported(helpers.spec(DEFAULT, cases.arrays(DEFAULT))) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(**GOOD | bad)


@pytest.mark.parametrize(
    "state", [(ONES, ONES, ONES), (LINES,)], ids=["plain", "packed"]
)
def test_what_is_no_error(state):
    call(**GOOD | {"state": state, "seeds": jnp.zeros((3,), jnp.int32)})
