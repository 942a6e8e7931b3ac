"""What a case is: one call of the package, without its numbers."""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam._types import ImplementationName, Storage
from sparse_adam.kernels.layout import PackedLayout, PlainLayout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.options import UpdateInputs, UpdateOptions
from sparse_adam.rules import AdamRule, UpdateRule

# Which rows a batch names; `batches.py` says how each is drawn.
Ids: TypeAlias = Literal["zipf", "hot", "distinct", "padded", "wild", "sorted", "nan"]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One call of the package, without its numbers.

    Attributes:
        implementation: None is the default choice.
        storage: "plain" or "packed".
        kind: "update" compares new rows with the reference; "mean" the mean of
            stochastic rounding with what is rounded; "lookup" rows bit for bit.
        num_rows: V.
        dim: D.
        num_ids: N.
        ids: how they are drawn.
        dtypes: of the table, of the slots and of the gradients.
        rule: of the update.
        options: of `sparse_update`, as pairs of name and value.
        weighted: whether gradients come by sample ids and gains.
        planned: whether a plan is made before and passed.
        steps: updates in a row, each with a batch of its own.
        devices: that share the rows.
        spread: whether the batch is spread over the devices too.
        config: block sizes of the kernel; None leaves them to it.
        seed: of the numbers of its state and batches.
    """

    implementation: ImplementationName | None = None
    storage: Storage = "plain"
    kind: Literal["update", "mean", "lookup"] = "update"
    num_rows: int = 40
    dim: int = 128
    num_ids: int = 24
    ids: Ids = "zipf"
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32")
    rule: UpdateRule = AdamRule()  # noqa: RUF009 (it is frozen)
    options: tuple[tuple[str, Any], ...] = ()
    weighted: bool = False
    planned: bool = False
    steps: int = 1
    devices: int = 1
    spread: bool = False
    config: dispatch.Config | None = None
    seed: int = 0

    def but(self, **changes: Any) -> "Case":
        """Returns a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def way(self) -> str:
        """Returns what runs: the implementation and the storage."""
        return f"{self.implementation or 'default'} {self.storage}"

    def __str__(self) -> str:
        """Says what is not as in the default case, in words of the call."""
        words = ["" if self.kind == "update" else self.kind]
        words += [f"V={self.num_rows} D={self.dim} N={self.num_ids} ids={self.ids}"]
        if set(self.dtypes) != {"float32"}:
            one = self.dtypes[0] if len(set(self.dtypes)) == 1 else self.dtypes
            words.append(f"dtypes={one}")
        if self.rule != AdamRule():
            words.append(call_of(self.rule))
        words += [f"{name}={value!r}" for name, value in self.options]
        words += ["sample_ids, gains"] * self.weighted + ["plan"] * self.planned
        words += [f"steps={self.steps}"] * (self.steps > 1)
        words += [f"devices={self.devices}"] * (self.devices > 1)
        words += ["batch spread"] * self.spread
        if self.config is not None:
            words.append(f"config={call_of(self.config)}")
        words += [f"seed={self.seed}"] * (self.seed > 0)
        return " ".join(word for word in words if word)

    @property
    def unit(self) -> int:
        """Returns what V must be a multiple of, for each device to have whole tiles."""
        if self.storage == "plain" or self.devices == 1:
            return self.devices
        layout = self.spec().layout
        return self.devices * layout.with_rows(1).room

    def spec(self) -> UpdateSpec:
        """Returns the record that the package makes of this update."""
        slots = self.rule.slots
        table, slot, grads = (jnp.dtype(name) for name in self.dtypes)
        dtypes = (table, *(slot for _ in slots))
        if self.storage == "packed":
            layout = PackedLayout(self.num_rows, self.dim, dtypes)
        else:
            per_row = (False, *(one.per == "row" for one in slots))
            dtypes = tuple(
                jnp.dtype("float32") if alone else own
                for own, alone in zip(dtypes, per_row, strict=True)
            )
            layout = PlainLayout(self.num_rows, self.dim, dtypes, per_row)
        num_grads = self.num_ids // 2 + 1 if self.weighted else self.num_ids
        array = np.zeros((num_grads, self.dim), grads)
        ids = np.zeros(self.num_ids, np.int32)
        inputs = UpdateInputs(ids, array, sample_ids=ids if self.weighted else None)
        options = UpdateOptions(0.01, **self.arguments())
        return validate.update_spec(layout, inputs, self.rule, options)

    def arguments(self) -> dict[str, Any]:
        """Returns the options, with a key where rounding needs one."""
        found = dict(self.options)
        if found.get("rounding") == "stochastic":
            found["key"] = jax.random.key(0)
        return found

    def objection(self) -> str | None:
        """Says why the implementation cannot do this case, or returns None."""
        if self.kind == "lookup" or self.implementation is None:
            return None
        place = dispatch.NAMES.index(self.implementation)
        return dispatch.IMPLEMENTATIONS[place].unsupported(self.spec())


def call_of(made: Any) -> str:
    """Returns the call that makes a rule or a config, without what is by default."""
    given = [
        f"{field.name}={getattr(made, field.name)!r}"
        for field in dataclasses.fields(made)
        if getattr(made, field.name) != field.default
    ]
    return f"{type(made).__name__}({', '.join(given)})"
