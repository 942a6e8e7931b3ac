"""Who takes part: one line of `CONTENDERS` each."""

from functools import partial

from benchmarks.contenders import (
    bare_loop,
    jax_programs,
    memory_copy,
    torch_programs,
)
from benchmarks.contenders.base import Contender, Running, anything
from sparse_adam._types import ImplementationName

__all__ = ["CONTENDERS", "COPY", "OURS", "Contender", "Running"]

COPY = "copy"
# The best first, as `None` chooses.
OURS: tuple[ImplementationName, ...] = (
    "sparsecore",
    "tensorcore",
    "sweep",
    "cpu",
    "xla",
)


def _ours(name: ImplementationName) -> Contender:
    return Contender(
        name,
        f"sparse_adam, {name}",
        partial(jax_programs.start, partial(jax_programs.ours, name)),
        partial(jax_programs.ours_unsupported, name),
    )


def _fbgemm(name: str, title: str, optimizer: str, by_row: bool) -> Contender:
    return Contender(
        name,
        title,
        partial(torch_programs.Fbgemm, optimizer),
        torch_programs.no_padding,
        partial(torch_programs.adagrad, by_row=by_row),
        slots=0 if by_row else 1,
        host_only=True,
    )


CONTENDERS = {
    contender.name: contender
    for contender in (
        *map(_ours, OURS),
        Contender("packed", "sparse_adam, packed", jax_programs.start_packed, anything),
        Contender(
            "at_set",
            "plain JAX, .at[].set",
            partial(jax_programs.start, jax_programs.at_set),
        ),
        Contender(
            "optax",
            "optax.adam, dense",
            partial(jax_programs.start, jax_programs.optax_dense),
            jax_programs.dense_unsupported,
            jax_programs.dense_adam,
        ),
        Contender(
            "keras",
            "keras.optimizers.Adam, dense",
            partial(jax_programs.start, jax_programs.keras_dense),
            jax_programs.dense_unsupported,
            jax_programs.keras_adam,
        ),
        Contender(
            "torch",
            "torch.optim.SparseAdam",
            torch_programs.SparseAdam,
            torch_programs.no_padding,
            torch_programs.sparse_adam,
            host_only=True,
        ),
        Contender(
            "torch_rows",
            "torch, Adam on rows by hand",
            torch_programs.RowAdam,
            host_only=True,
        ),
        _fbgemm("fbgemm", "FBGEMM, Adagrad", "EXACT_ADAGRAD", by_row=False),
        _fbgemm(
            "fbgemm_rows",
            "FBGEMM, row-wise Adagrad",
            "EXACT_ROWWISE_ADAGRAD",
            by_row=True,
        ),
        Contender(
            "bare_loop",
            "a bare loop over the rows",
            bare_loop.BareLoop,
            bare_loop.unsupported,
            expected=None,
            host_only=True,
        ),
        Contender(
            COPY,
            "copy of 512 MiB",
            lambda workload: memory_copy.start(),
            anything,
            expected=None,
            moves=2 * memory_copy.COPIED,
        ),
        Contender(
            "torch_copy",
            "torch's copy of 512 MiB",
            lambda workload: torch_programs.TorchCopy(memory_copy.COPIED),
            anything,
            expected=None,
            moves=2 * memory_copy.COPIED,
            host_only=True,
        ),
    )
}
