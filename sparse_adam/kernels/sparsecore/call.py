"""The call of the kernel: compiled for a TPU's vector subcores, or interpreted."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from sparse_adam.kernels.sparsecore.accumulate import Accumulate
from sparse_adam.kernels.sparsecore.config import Config
from sparse_adam.kernels.sparsecore.memory import Operands, SubcoreScratch
from sparse_adam.kernels.sparsecore.occurrences import EachOccurrence
from sparse_adam.kernels.sparsecore.records import RowRecords
from sparse_adam.kernels.sparsecore.roots import ensure_roots
from sparse_adam.kernels.sparsecore.shim import Interpreted, Native
from sparse_adam.kernels.sparsecore.work import SubcoreWork
from sparse_adam.kernels.spec import State, UpdateSpec
from sparse_adam.kernels.tiles import SUBLANES


class Inputs(NamedTuple):
    """Arrays that are only read; `Operands` says what they are."""

    work: SubcoreWork
    numbers: jax.Array
    seeds: tuple[jax.Array, ...]
    grads: jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class SubcoreKernel:
    """A kernel with all that is static in a call of it: sizes, spec, cost."""

    records: RowRecords
    spec: UpdateSpec
    config: Config
    cost: pl.CostEstimate

    def _body(self, on: Native | Interpreted, operands: Operands, scratch: Any) -> None:
        """Runs one subcore's pipeline: a step for each row, or each occurrence."""
        kind = Accumulate if self.spec.accumulate else EachOccurrence
        kind(on, operands, scratch, self.records, self.spec, self.config).run()

    @property
    def _scratch(self) -> SubcoreScratch:
        return SubcoreScratch.types(self.config, self.records, self.spec.accumulate)

    def _no_sums(self, state: State) -> jax.Array:
        rows = pl.cdiv(2 * self.config.workers, SUBLANES) * SUBLANES
        size = rows * self.records.blocks * self.records.width
        return jnp.zeros_like(state[0], jnp.float32, shape=(size,))

    def compiled(
        self, inputs: Inputs, state: State, *, name: str
    ) -> tuple[State, jax.Array]:
        """Updates records of the state; returns them and the sums of split runs."""
        ensure_roots()
        types, structure = jax.tree.flatten(self._scratch)

        def subcore(*refs: Any) -> None:
            operands, scratch = refs[: -len(types)], refs[-len(types) :]
            self._body(
                Native(self.config.cores),
                Operands(*operands),
                jax.tree.unflatten(structure, scratch),
            )

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
            # The vectors are of the size of a register, and the ids proven in range.
            compiler_params=pltpu.CompilerParams(
                needs_layout_passes=False,
                disable_bounds_checks=True,
                use_tc_tiling_on_sc=self.records.keeps_tiles,
            ),
        )
        in_place = pl.run_state(lambda refs: kernel(*inputs, *refs))
        return in_place((state, self._no_sums(state)))

    def interpreted(
        self, inputs: Inputs, state: State, *, name: str
    ) -> tuple[State, jax.Array]:
        """Does the same by an ordinary Pallas call: each subcore is a grid step."""

        def subcore(inputs: Any, state_in: Any, *refs: Any) -> None:
            del state_in  # the same memory as the state that goes out
            (work, numbers, seeds, grads), (state, sums, scratch) = inputs, refs
            operands = Operands(work, numbers, seeds, grads, state, sums)
            self._body(Interpreted(), operands, scratch)

        operands = (inputs, state)
        count = len(jax.tree.leaves(inputs))
        hbm = pl.BlockSpec(memory_space=pl.ANY)
        state, sums = pl.pallas_call(
            subcore,
            name=name,
            grid=(self.config.workers,),
            in_specs=jax.tree.map(lambda _: hbm, operands),
            out_specs=((hbm,) * len(state), hbm),
            # Not plain shapes: inside `shard_map` an output varies as the state does.
            out_shape=jax.eval_shape(lambda *x: (x, self._no_sums(x)), *state),
            input_output_aliases={count + i: i for i in range(len(state))},
            cost_estimate=self.cost,
            scratch_shapes=(self._scratch,),
            interpret=True,
        )(*operands)
        return state, sums
