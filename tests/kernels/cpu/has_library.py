"""Fails if the installed package has no C++ kernel, or does not use it on a CPU."""

import jax.numpy as jnp

import sparse_adam

table = jnp.zeros((8, 4))
told = sparse_adam.explain(
    table, table, table, jnp.zeros(1, jnp.int32), jnp.zeros((1, 4)), learning_rate=0.1
)
print(told)
if not told.startswith("here, on cpu: cpu, compiled"):
    raise SystemExit("the C++ kernel is not in this wheel, or does not load")
