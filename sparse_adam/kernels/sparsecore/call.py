"""The call of a kernel: compiled for a TPU's vector subcores, or interpreted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from sparse_adam.kernels.sparsecore.config import Config
from sparse_adam.kernels.sparsecore.roots import ensure_roots
from sparse_adam.kernels.sparsecore.shim import Interpreted, Native


@dataclasses.dataclass(frozen=True, slots=True)
class SubcoreProgram:
    """A program of all vector subcores, with all that is static in a call of it.

    Attributes:
        body: `body(on, operands, scratch)` runs one subcore. The operands are refs of
            the inputs, then of what is changed in place.
        scratch: a pytree of what each subcore allocates.
        config: how the work is cut.
        keeps_tiles: whether arrays stay in the tiles of a TensorCore.
        cost: as XLA is told.
    """

    body: Callable[[Native | Interpreted, tuple, Any], None]
    scratch: Any
    config: Config
    keeps_tiles: bool
    cost: pl.CostEstimate

    def run(self, inputs: tuple, state: tuple, *, name: str, interpret: bool) -> tuple:
        """Returns the state, two tuples of pytrees, as the program leaves it."""
        run = self._interpreted if interpret else self._compiled
        return run(inputs, state, name=name)

    def _compiled(self, inputs: tuple, state: tuple, *, name: str) -> tuple:
        ensure_roots()
        types, structure = jax.tree.flatten(self.scratch)

        def subcore(*refs: Any) -> None:
            operands, scratch = refs[: -len(types)], refs[-len(types) :]
            scratch = jax.tree.unflatten(structure, scratch)
            self.body(Native(self.config), operands, scratch)

        kernel: Any = pl.kernel(
            subcore,
            name=name,
            mesh=plsc.VectorSubcoreMesh(
                core_axis_name="core",
                subcore_axis_name="subcore",
                num_cores=self.config.cores,
                num_subcores=self.config.subcores,
            ),
            scratch_types=types,
            cost_estimate=self.cost,
            # The vectors are of the size of a register.
            compiler_params=pltpu.CompilerParams(
                needs_layout_passes=False,
                use_tc_tiling_on_sc=self.keeps_tiles,
            ),
        )
        return pl.run_state(lambda refs: kernel(*inputs, *refs))(state)

    def _interpreted(self, inputs: tuple, state: tuple, *, name: str) -> tuple:
        """Does the same by an ordinary Pallas call: each subcore is a grid step."""

        def subcore(inputs: tuple, state_in: Any, *refs: Any) -> None:
            del state_in  # the same memory as the state that goes out
            *state, scratch = refs
            self.body(Interpreted(), (*inputs, *state), scratch)

        operands = (inputs, state)
        count = len(jax.tree.leaves(inputs))
        hbm = pl.BlockSpec(memory_space=pl.ANY)
        return pl.pallas_call(
            subcore,
            name=name,
            grid=(self.config.workers,),
            in_specs=jax.tree.map(lambda _: hbm, operands),
            out_specs=jax.tree.map(lambda _: hbm, state),
            # Not plain shapes: inside `shard_map` an output varies as the state does.
            out_shape=jax.eval_shape(lambda *x: x, *state),
            input_output_aliases={
                count + i: i for i in range(len(jax.tree.leaves(state)))
            },
            cost_estimate=self.cost,
            scratch_shapes=(self.scratch,),
            interpret=True,
        )(*operands)
