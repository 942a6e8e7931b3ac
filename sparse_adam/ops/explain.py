"""Telling what would run, and why."""

import inspect
from typing import Any

from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.packed import PackedTable, logical_shapes, packed_adam_update
from sparse_adam.ops.run import of_one_device
from sparse_adam.ops.sparse_adam import sparse_adam_update


def explain(*args: Any, **kwargs: Any) -> str:
    """Tells which implementation an update would run, and why not the others.

    Takes the arguments of `sparse_adam_update` or `packed_adam_update`, as arrays or as
    `jax.ShapeDtypeStruct`s, and runs nothing. Of a table that is spread over devices it
    tells what one of them does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> table = jax.ShapeDtypeStruct((1_000_000, 128), jnp.bfloat16)
        >>> ids = jax.ShapeDtypeStruct((4096,), jnp.int32)
        >>> grads = jax.ShapeDtypeStruct((4096, 128), jnp.float32)
        >>> print(explain(table, table, table, ids, grads)) # doctest: +ELLIPSIS
        tpu: sweep, compiled
          sweep Config(...) takes ... bytes of VMEM on ...
        cpu: ..., compiled
        elsewhere: xla, compiled
          sparsecore: table is bfloat16; indirect streams move words of 32 bits
          tensorcore: table is bfloat16; rows move one by one, ...
          sweep: compiled on tpu; elsewhere interpreted, if named
          cpu: ...
          xla: can run this update anywhere
    """
    packed = kwargs.get("packed", args[0] if args else None)
    is_packed = isinstance(packed, PackedTable)
    function = packed_adam_update if is_packed else sparse_adam_update
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    arguments = call.arguments
    array = packed.lines if is_packed else arguments["table"]
    if is_packed:
        shapes = logical_shapes(arguments.pop("packed"))
        names = ("table", "momenta", "velocities")
        arguments |= dict(zip(names, shapes, strict=True)) | {"packed": True}
    implementation, config = arguments.pop("implementation"), arguments.pop("config")
    arguments.pop("learning_rate")
    problem, _ = of_one_device(validate.problem(**arguments), array)
    return dispatch.explain(problem, implementation, config)
