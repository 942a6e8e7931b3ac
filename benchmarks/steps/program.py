"""The programs of `step --static`: `benchmarks.steps.program:NAME`, by case."""

import jax
import jax.numpy as jnp

from benchmarks.static.program import Built, Program
from benchmarks.steps.cases import COMPILED, COMPILED_QUICK, StepCase
from benchmarks.steps.contenders import OPTIMIZER, Training, first_embedding, our_step
from benchmarks.steps.model import Batch
from benchmarks.workload import RATE
from sparse_adam.embedding import Adam

CASES = {case.name: case for case in (*COMPILED, *COMPILED_QUICK)}


def __getattr__(name: str) -> Program:
    """Returns the program of a case."""
    if name not in CASES:
        raise AttributeError(f"{name!r} is not one of {', '.join(CASES)}")
    return Program(name, lambda rows, dim, ids: build(CASES[name], rows, dim, ids))


def build(case: StepCase, cap: int, dim: int, batch: int) -> Built:
    """Returns our step on flat arrays; all but the batch are updated in place."""
    model = case.sized(cap=cap, dim=dim, batch=batch).model()

    def start() -> Training:
        tables = {name: jnp.zeros(table) for name, table in model.tables.items()}
        weights = {name: jnp.zeros(shape) for name, shape in model.weights.items()}
        embedding = first_embedding(model, Adam(RATE), tables.__getitem__)
        return Training(embedding, weights, OPTIMIZER.init(weights))

    training = jax.eval_shape(start)
    batch_types = Batch(
        {
            name: jax.ShapeDtypeStruct(feature.shape, jnp.int32)
            for name, feature in model.features.items()
        },
        {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in model.inputs.items()
        },
    )
    number = jax.ShapeDtypeStruct((), jnp.float32)
    leaves, structure = jax.tree.flatten((training, batch_types, number))

    def step(*arrays: jax.Array) -> tuple[Training, jax.Array]:
        return our_step(model, *jax.tree.unflatten(structure, arrays))

    donated = tuple(range(len(jax.tree.leaves(training))))
    return step, tuple(leaves), donated
