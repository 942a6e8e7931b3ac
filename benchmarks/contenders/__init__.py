"""Who takes part: one line of `CONTENDERS` each."""

from functools import partial

from benchmarks.contenders import copy, jax, torch
from benchmarks.contenders.base import Contender, Running, anything

__all__ = ["CONTENDERS", "COPY", "OURS", "Contender", "Running"]

COPY = "copy"
# The best first, as `None` chooses.
OURS = ("sparsecore", "tensorcore", "sweep", "cpu", "xla")


def _ours(name: str) -> Contender:
    return Contender(
        name,
        f"sparse_adam, {name}",
        partial(jax.start, partial(jax.ours, name)),
        partial(jax.ours_unsupported, name),
    )


def _fbgemm(name: str, title: str, optimizer: str, by_row: bool) -> Contender:
    return Contender(
        name,
        title,
        partial(torch.Fbgemm, optimizer),
        torch.no_padding,
        partial(torch.adagrad, by_row=by_row),
        slots=0 if by_row else 1,
        host_only=True,
    )


CONTENDERS = {
    contender.name: contender
    for contender in (
        *map(_ours, OURS),
        Contender("packed", "sparse_adam, packed", jax.start_packed, anything),
        Contender("at_set", "plain JAX, .at[].set", partial(jax.start, jax.at_set)),
        Contender(
            "optax",
            "optax.adam, dense",
            partial(jax.start, jax.optax_dense),
            jax.dense_unsupported,
            jax.dense_adam,
        ),
        Contender(
            "keras",
            "keras.optimizers.Adam, dense",
            partial(jax.start, jax.keras_dense),
            jax.dense_unsupported,
            jax.keras_adam,
        ),
        Contender(
            "torch",
            "torch.optim.SparseAdam",
            torch.SparseAdam,
            torch.no_padding,
            torch.sparse_adam,
            host_only=True,
        ),
        Contender(
            "torch_rows", "torch, Adam on rows by hand", torch.RowAdam, host_only=True
        ),
        _fbgemm("fbgemm", "FBGEMM, Adagrad", "EXACT_ADAGRAD", by_row=False),
        _fbgemm(
            "fbgemm_rows",
            "FBGEMM, row-wise Adagrad",
            "EXACT_ROWWISE_ADAGRAD",
            by_row=True,
        ),
        Contender(
            COPY,
            "copy of 512 MiB",
            lambda workload: copy.start(),
            anything,
            expected=None,
            moves=2 * copy.COPIED,
        ),
        Contender(
            "torch_copy",
            "torch's copy of 512 MiB",
            lambda workload: torch.TorchCopy(copy.COPIED),
            anything,
            expected=None,
            moves=2 * copy.COPIED,
            host_only=True,
        ),
    )
}
