"""Steps that `check_rule` refuses, and steps that it takes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparse_adam.rules import AdamRule, Slot, check_rule

F32 = np.float32
ARRAY = jnp.float32(0.5)
LANES = np.arange(5, dtype=F32)


@dataclasses.dataclass(frozen=True)
class Custom:
    """A rule of one slot that steps along `function(gradient, slot)`."""

    function: Any
    per: Any = "element"

    @property
    def slots(self):
        return (Slot("sums", 1.0, self.per),)

    def step(self, values, gradient, rate):
        w, a = values
        return w - rate * self.function(gradient, a), a


@dataclasses.dataclass(frozen=True)
class Whole:
    """A rule whose step is any function."""

    function: Any
    slots: Any = (Slot("sums"),)

    def step(self, values, gradient, rate):
        return self.function(values, gradient, rate)


def over_rows(function):
    return lambda g, a: g * function(g)


MIX_ROWS = {
    "all": over_rows(jnp.sum),
    "all_in_two": over_rows(lambda g: jnp.sum(jnp.sum(g, axis=-1))),
    "max_in_two": over_rows(lambda g: jnp.max(jnp.max(g, axis=-1, keepdims=True))),
    "axis_0": over_rows(lambda g: jnp.sum(g, axis=0, keepdims=True)),
    "axis_0_mean": over_rows(lambda g: jnp.mean(g, axis=0, keepdims=True)),
    "of_row_sums": over_rows(
        lambda g: jnp.sum(jnp.sum(g, axis=-1, keepdims=True), axis=0, keepdims=True)
    ),
    "global_norm": over_rows(lambda g: lax.rsqrt(jnp.vdot(g, g))),
    "norm": over_rows(jnp.linalg.norm),
    "cumsum": over_rows(lambda g: jnp.cumsum(g, axis=0)),
    "roll": over_rows(lambda g: jnp.roll(g, 1, axis=0)),
    "sort": over_rows(lambda g: jnp.sort(g, axis=0)),
    "flip": over_rows(lambda g: g[::-1]),
    "first": over_rows(lambda g: g[:1]),
    "gather": over_rows(lambda g: g[np.array([2, 1, 0])]),
    "take": over_rows(lambda g: jnp.take(g, jnp.zeros(g.shape[0], int), axis=0)),
    "transpose": over_rows(lambda g: jnp.sum(g.T)),
    "dot": over_rows(lambda g: (g @ g.T) @ g),
    "reshape": over_rows(lambda g: jnp.sum(g.reshape(1, -1), -1, keepdims=True)),
    "flat": over_rows(lambda g: jnp.sum(g.ravel())),
    "inside_jit": over_rows(jax.jit(lambda g: jnp.sum(g, axis=0, keepdims=True))),
    "inside_relu": over_rows(
        lambda g: jax.nn.relu(jnp.max(g, axis=0, keepdims=True)),
    ),
    "scan": over_rows(lambda g: lax.associative_scan(jnp.add, g)),
    "loop": over_rows(lambda g: lax.fori_loop(0, 3, lambda i, x: x + g[i, 0], 0 * g)),
    "slot": lambda g, a: g + jnp.sum(a, axis=0, keepdims=True),
}


@pytest.mark.parametrize("name", MIX_ROWS)
@pytest.mark.parametrize("per", ["element", "row"])
def test_rows_may_not_be_mixed(name, per):
    with pytest.raises(ValueError, match=r"step is no step of rows: it (reduces|uses)"):
        check_rule(Custom(MIX_ROWS[name], per))


def test_the_error_says_what_to_write():
    match = r"reduces over axes \(0,\) .*shape \(3, 5\).*axis=-1, keepdims=True"
    with pytest.raises(ValueError, match=match):
        check_rule(Custom(MIX_ROWS["axis_0"]))


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (twice(x), None), lambda _, g: (2 * g,))

# Of each, what a vector subcore has not.
ELEMENTWISE = {
    "clip": (lambda g, a: jnp.clip(g, -1.0, 1.0), ()),
    "clamp": (lambda g, a: lax.clamp(-1.0, g, 1.0), ()),
    "where": (lambda g, a: jnp.where(jnp.abs(g) > a, g, 0.0), ()),
    "logic": (lambda g, a: jnp.where((g > 0) & ~(a > 1) | (g == 2), g, a), ()),
    "select": (lambda g, a: lax.select(g > 0, g, -a), ()),
    "minimum": (lambda g, a: jnp.minimum(jnp.maximum(g, -1.5), 2), ()),
    "sign": (lambda g, a: jnp.sign(g), ()),
    "square": (lambda g, a: jnp.square(g), ("square",)),
    "power_2": (lambda g, a: g**2, ("integer_pow",)),
    "power_3": (lambda g, a: g**3, ("integer_pow",)),
    "reciprocal": (lambda g, a: a**-1, ("integer_pow",)),
    "power_half": (lambda g, a: g * a**0.5, ("pow",)),
    "power": (lambda g, a: jnp.power(a, np.float32(0.3)), ("pow",)),
    "roots": (lambda g, a: g / jnp.sqrt(a) + lax.rsqrt(a), ()),
    "exp": (lambda g, a: jnp.exp(-a) * g, ()),
    "log": (lambda g, a: jnp.log(a) * g, ("log",)),
    "tanh": (lambda g, a: jnp.tanh(g), ("tanh",)),
    "sigmoid": (lambda g, a: jax.nn.sigmoid(g), ("logistic",)),
    "relu": (lambda g, a: jax.nn.relu(g), ("custom_jvp_call",)),
    "custom": (lambda g, a: twice(g), ("custom_vjp_call",)),
    "stop": (lambda g, a: lax.stop_gradient(g), ("stop_gradient",)),
    "nan_to_num": (lambda g, a: jnp.nan_to_num(g), ()),
    "isfinite": (lambda g, a: jnp.where(jnp.isfinite(g), g, 0.0), ("is_finite",)),
    "full": (lambda g, a: g + jnp.full_like(g, 2.0) + jnp.zeros(g.shape), ()),
    "numpy_scalar": (lambda g, a: g * F32(0.5) + np.float64(2), ()),
    "array_of_a_number": (lambda g, a: g * jnp.float32(0.5) + jnp.asarray(2.0), ()),
    "gelu": (lambda g, a: jax.nn.gelu(g), ("integer_pow", "tanh")),
    "integers": (lambda g, a: g * (a.astype(jnp.int32) % 3).astype(F32), ()),
    "unsigned": (
        lambda g, a: g * a.astype(jnp.uint32).astype(F32),
        ("convert_element_type between float32 and uint32",),
    ),
    "bits": (
        lambda g, a: lax.bitcast_convert_type(
            lax.bitcast_convert_type(g, jnp.int32) & 0x7FFFFFFF, jnp.float32
        ),
        (),
    ),
    "jitted": (lambda g, a: jax.jit(lambda x: x * x)(g), ()),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("per", ["element", "row"])
def test_elementwise_steps_are_taken(name, per):
    function, beyond = ELEMENTWISE[name]

    def of_row(g, a):  # where the slot is `[..., 1]`
        return function(g, g * 0 + a)

    facts = check_rule(Custom(function if per == "element" else of_row, per))
    assert facts.beyond_subcores == beyond
    assert (facts.per_row, facts.whole_rows) == (per == "row", False)


OF_ROWS = {
    "sum": lambda g: jnp.sum(g * g, axis=-1, keepdims=True),
    "sum_axis_1": lambda g: jnp.sum(g * g, axis=1, keepdims=True),
    "sum_without_axis": lambda g: jnp.sum(g, axis=-1)[:, None],
    "mean": lambda g: jnp.mean(g, axis=-1, keepdims=True),
    "max": lambda g: jnp.max(g, axis=-1, keepdims=True),
    "min": lambda g: jnp.min(g, axis=-1)[..., None],
    "norm": lambda g: jnp.linalg.norm(g, axis=-1, keepdims=True),
    "var": lambda g: jnp.var(g, axis=-1, keepdims=True),
    "any": lambda g: jnp.where(jnp.any(g > 1, axis=-1, keepdims=True), F32(1), F32(2)),
    "all": lambda g: jnp.where(jnp.all(g > 1, axis=-1, keepdims=True), F32(1), F32(2)),
    "softmax": lambda g: jax.nn.softmax(g, axis=-1),
    "twice": lambda g: jnp.max(g / jnp.sum(g, -1, keepdims=True), -1, keepdims=True),
    "jitted": jax.jit(lambda g: jnp.sum(g, axis=-1, keepdims=True)),
    # No reduction, but a number that depends on the width.
    "width": lambda g: g / np.sqrt(F32(g.shape[-1])),
    "size_of_a_row": lambda g: g * F32(g.shape[-1] >= 64),
}


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("per", ["element", "row"])
def test_steps_of_whole_rows_are_taken(name, per):
    facts = check_rule(Custom(lambda g, a: g * OF_ROWS[name](g) + a, per))
    assert facts.whole_rows
    reduces = any(name.startswith("reduce") for name in facts.beyond_subcores)
    assert reduces == (name not in ("width", "size_of_a_row"))


REFUSED = {
    "array": (lambda g, a: g * ARRAY, r"arrays that it was not given, .'float32\[\]'"),
    "array_in_jit": (
        lambda g, a: jax.jit(lambda x: x * ARRAY)(g),
        r"arrays that it was not given, .'float32\[\]'",
    ),
    "lanes_in_jit": (
        lambda g, a: jax.jit(lambda x: x * LANES[None])(g),
        r"not given, .'float32\[1, 5\]'.*Python numbers",
    ),
    "lanes": (
        lambda g, a: g * LANES[None],
        r"not given, .'float32\[1, 5\]'.*Python numbers",
    ),
    "rows": (lambda g, a: g * np.ones((3, 5), F32), r"not given, .'float32\[3, 5\]'"),
    "half": (
        lambda g, a: g.astype(jnp.bfloat16).astype(F32),
        "makes a bfloat16 by `convert_element_type`: kernels compute in float32",
    ),
    "bytes": (lambda g, a: g.astype(jnp.int8).astype(F32), "makes a int8"),
    "remat": (lambda g, a: jax.checkpoint(jnp.sin)(g), "uses `remat2`"),
    "copy": (lambda g, a: jnp.copy(g), "uses `copy`"),
    "iota": (lambda g, a: g * lax.broadcasted_iota(F32, g.shape, 1), "uses `iota`"),
    "product": (lambda g, a: jnp.prod(g, -1, keepdims=True), "uses `reduce_prod`"),
    "lanes_moved": (lambda g, a: jnp.roll(g, 1, axis=-1), "uses `(slice|concatenate)`"),
    "concatenated": (lambda g, a: jnp.concatenate([g, a], -1)[:, :5], "`concatenate`"),
    "print": (
        lambda g, a: (jax.debug.print("{g}", g=g), g)[1],
        "uses `debug_(print|callback)`",
    ),
    "random": (
        lambda g, a: g * jax.random.normal(jax.random.key(0), g.shape),
        "step is no step of rows: it makes a key<fry> by `random_seed`",
    ),
    "cond": (lambda g, a: lax.cond(g.sum() > 0, jnp.sin, jnp.cos, g), "uses|reduces"),
    "num_rows": (lambda g, a: g / g.shape[0], "depends on the number of rows"),
    "rows_by_eight": (
        lambda g, a: 2 * g if g.shape[0] % 8 == 0 else g,
        "depends on the number of rows",
    ),
    "num_elements": (lambda g, a: g / g.size, "depends on the number of rows"),
    "two_axes": (
        lambda g, a: g + jnp.zeros((g.shape[0], g.shape[1])),
        r"takes tiles of two axes only, and failed for one of shape \(5,\)",
    ),
    "leading_axis": (
        lambda g, a: (
            g + jnp.zeros((g.shape[0], g.shape[-1]))
            if g.ndim > 1
            else g + jnp.zeros(g.shape)
        ),
        r"takes tiles of two axes only, and failed for one of shape \(2, 3, 5\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kernels_cannot_do_is_refused(name):
    function, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        check_rule(Custom(function))


def test_scalars_of_the_rate():
    """A TensorCore has all of them but powers, a vector subcore few."""
    for function, beyond in (
        (jnp.sqrt, ("sqrt of a scalar",)),
        (lambda r: 1 / r, ("div of a scalar",)),
        (lambda r: jnp.exp(-r), ("exp of a scalar",)),
        (lambda r: jnp.where(r > 0, r, 1.0) * 2, ()),
    ):

        def step(values, gradient, rate, function=function):
            w, a = values
            return w - function(rate) * gradient, a

        assert check_rule(Whole(step)).beyond_subcores == beyond

    def power(values, gradient, rate):
        w, a = values
        return w - rate**0.5 * gradient, a

    with pytest.raises(ValueError, match=r"power of a scalar: use jnp\.sqrt, or jnp"):
        check_rule(Whole(power))


VALUES = {
    "too_few": (lambda w, a, g: (w,), r"a tuple of 2 values, \('weights', 'sums'\)"),
    "too_many": (lambda w, a, g: (w, a, a), "it returned 3 values"),
    "a_list": (lambda w, a, g: [w, a], "it returned <class 'list'>"),
    "an_array": (lambda w, a, g: w, "must return a tuple of 2 values"),
    "none": (lambda w, a, g: (w, None), "turned sums, an array, into None"),
    "nested": (lambda w, a, g: (w, (a,)), "turned sums, an array, into "),
    "a_number": (lambda w, a, g: (1.0, a), "turned weights, an array, into 1.0"),
    "scalar": (
        lambda w, a, g: (w, np.float32(1)),
        r"turned sums of float32\[3, 5\] into float32\[\]",
    ),
    "narrower": (
        lambda w, a, g: (w, jnp.sum(a, -1, keepdims=True)),
        r"turned sums of float32\[3, 5\] into float32\[3, 1\]",
    ),
    "flat": (lambda w, a, g: (jnp.sum(w, -1), a), r"turned weights .* float32\[3\]"),
    "integers": (
        lambda w, a, g: (w, a.astype(jnp.int32)),
        r"turned sums of float32\[3, 5\] into int32\[3, 5\]: it must keep shapes",
    ),
    "half": (lambda w, a, g: (w.astype(jnp.bfloat16), a), r"into bfloat16\[3, 5\]"),
    "condition": (lambda w, a, g: (w, g > 0), r"turned sums .* into bool\[3, 5\]"),
}


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(name):
    function, match = VALUES[name]
    with pytest.raises(ValueError, match=match):
        check_rule(Whole(lambda values, g, rate: function(*values, g)))


def test_a_slot_per_row_must_stay_narrow():
    rule = Whole(lambda v, g, r: (v[0], v[1] + g), (Slot("sums", per="row"),))
    match = r"turned sums of float32\[3, 1\] into float32\[3, 5\]"
    with pytest.raises(ValueError, match=match):
        check_rule(rule)


def test_errors_of_the_step_itself_say_whose_they_are():
    def step(values, gradient, rate):
        return values if gradient[0, 0] > 0 else (values[1], values[0])

    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        check_rule(Whole(step))
    assert "raised by Whole(function=" in error.value.__notes__[-1]


class NoStep:
    slots = ()


class ListOfSlots:
    slots = [Slot("sums")]  # noqa: RUF012

    def step(self, values, gradient, rate):
        return values


class Unhashable:
    slots = ()
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def step(self, values, gradient, rate):
        return values


class Named(NamedTuple):
    factor: float
    slots = ()

    def step(self, values, gradient, rate):
        return values


@dataclasses.dataclass
class Thawed:
    factor: float = 1.0
    slots = ()

    def step(self, values, gradient, rate):
        return values


@dataclasses.dataclass(eq=False)
class ThawedHashable(Thawed):
    pass


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (AdamRule, r"is a class: pass an object of it, AdamRule\(\)"),
        (None, "rule=None must be an update rule, such as AdamRule"),
        ("adam", "rule='adam' must be an update rule"),
        (NoStep(), "must be an update rule"),
        (Unhashable(), r"is not hashable .*dataclass\(frozen=True\)"),
        (Custom([1]), r"is not hashable \(unhashable type: 'list'\).*numbers, strings"),
        (Custom(np.ones(3)), "is not hashable"),
        (Named(1.0), r"is a named tuple, .*dataclass\(frozen=True\)"),
        (Thawed(), r"is not frozen: make it .*dataclass\(frozen=True\)"),
        (ThawedHashable(), "is not frozen"),
        (ListOfSlots(), r"slots=\[Slot.* must be a tuple of Slots"),
        (Whole(jnp.sin, ("sums",)), "must be a tuple of Slots"),
    ],
)
def test_what_is_no_rule(rule, match):
    with pytest.raises(TypeError, match=match):
        check_rule(rule)


def test_slots_with_equal_names():
    rule = Whole(lambda v, g, r: v, (Slot("a"), Slot("b"), Slot("a", per="row")))
    with pytest.raises(ValueError, match=r"names \['a', 'b', 'a'\]: they must differ"):
        check_rule(rule)


def test_a_plain_object_may_be_a_rule():
    class Plain:
        slots = (Slot("sums"),)

        def step(self, values, gradient, rate):
            return values

    assert not check_rule(Plain()).per_row
