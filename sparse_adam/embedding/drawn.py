"""The first weights of tables, drawn by parts on the devices that will have them."""

from typing import Any

import jax
import jax.core
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from sparse_adam.embedding.placed import parts_of
from sparse_adam.embedding.stacks import Table
from sparse_adam.ops.spread import Spread

_WORDS = {2: np.int16, 4: np.int32, 8: np.int64}


def drawn(table: Table, key: jax.Array, spread: Spread) -> list[jax.Array]:
    """Returns the first weights of a table in parts, and slots if a user makes them.

    They have the bits that the initializer returns when it is called for the whole
    table. It is traced, and XLA divides its work between devices. One that needs
    numbers, as NumPy's does, is called on the host.

    Args:
        table: whose initializer to call.
        key: of `jax.random`.
        spread: the devices.
    """

    def make(key: jax.Array) -> list[Any]:
        weights = table.config.initialize(key, table.name)
        if table.optimizer.slot_variable_creation_fn is None:
            return [weights]
        slots = table.optimizer.init_slots(weights, table.config.slot_dtype)
        return [weights, *(slots[name] for name in table.optimizer.slot_names)]

    try:
        closed = jax.make_jaxpr(make)(key)
    except jax.errors.JAXTypeError:
        return [parts_of(x, spread) for x in make(key)]
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    if all(x in known for x in closed.jaxpr.outvars):
        return [parts_of(known[x], spread) for x in closed.jaxpr.outvars]
    return _drawn(closed, key, spread)


def _drawn(closed: Any, key: jax.Array, spread: Spread) -> list[jax.Array]:
    """Draws by XLA, which is told how the results are spread."""
    automatic = Mesh(spread.mesh.devices, spread.mesh.axis_names)
    place = NamedSharding(automatic, spread.spec)
    scope = jax.sharding.get_abstract_mesh()
    explicit = not scope.empty and AxisType.Explicit in scope.axis_types

    def draw(key: Any, zero: jax.Array, consts: Any) -> list[jax.Array]:
        found = _evaluated(closed.jaxpr, consts, [key], zero)
        return [parts_of(x, spread) for x in found]

    if isinstance(key, jax.core.Tracer):
        found = draw(key, jnp.int32(0), closed.consts)
        if explicit:
            return found
        return [lax.with_sharding_constraint(x, place) for x in found]
    implementation, data = _data(key)

    def draw_by_data(data: Any, zero: jax.Array, consts: Any) -> list[jax.Array]:
        if implementation is not None:
            data = jax.random.wrap_key_data(data, impl=implementation)
        return draw(data, zero, consts)

    with jax.set_mesh(automatic):
        run = jax.jit(draw_by_data, out_shardings=place)
        found = run(data, np.int32(0), closed.consts)
    return [jax.device_put(x, spread.sharding) for x in found]


def _data(key: jax.Array) -> tuple[Any, np.ndarray]:
    """Returns a key as words on the host, which every process can pass to all."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return None, np.asarray(key)
    return jax.random.key_impl(key), np.asarray(jax.random.key_data(key))


def _evaluated(jaxpr: Any, consts: Any, arguments: Any, zero: jax.Array) -> list[Any]:
    """Evaluates operations as if each were a program of its own.

    In one program XLA may contract or reorder what follows one another, or fold a
    number into it, and a weight would differ in its last bit from that of an eager
    call. An exclusive or with a number that XLA cannot know to be zero keeps operations
    and numbers apart.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(x: Any) -> Any:
        if isinstance(x, jex.core.Literal):
            aval: Any = x.aval
            return _apart(jnp.asarray(x.val, aval.dtype), zero)
        return values[x]

    for eqn in jaxpr.eqns:
        # Older versions of JAX return functions beside the parameters.
        bound = eqn.primitive.get_bind_params(eqn.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        found = eqn.primitive.bind(*functions, *map(value, eqn.invars), **params)
        found = found if eqn.primitive.multiple_results else [found]
        values |= {x: _apart(y, zero) for x, y in zip(eqn.outvars, found, strict=True)}
    return list(map(value, jaxpr.outvars))


def _apart(x: jax.Array, zero: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    word = _WORDS[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, word) ^ zero.astype(word)
    return lax.bitcast_convert_type(bits, x.dtype)
