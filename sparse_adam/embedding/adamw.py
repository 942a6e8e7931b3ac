"""`AdamW`: Adam with decoupled weight decay, as `torch.optim.AdamW` computes it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from sparse_adam.embedding.adam_states import AnyAdamState, adam_kind
from sparse_adam.embedding.optimizer import Optimizer, SlotCreationFn
from sparse_adam.rules import AdamRule, numbers


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer[AnyAdamState]):
    r"""AdamW on the rows that were looked up, with the defaults of torch.

    .. math::

        w &\leftarrow w - \eta\, \lambda\, w \\
        w &\leftarrow w - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)

    with the moments of `AdamRule`, corrected for their bias. It is `Adam` with other
    arguments: `weight_decay_factor` is :math:`\lambda`, multiplied by the rate of the
    update, :math:`\epsilon` is outside of the root, and a slot counts the steps of
    each row. A row that occurs in every batch has the weights that torch gives it. One
    that does not occur keeps its bits, while torch would decay and move it;
    `lazy=False` updates all rows, as torch does.

    Args:
        learning_rate: :math:`\eta`; as of `Optimizer`. A schedule scales the decay too.
        beta_1: decay of the first moment, in `[0, 1)`.
        beta_2: decay of the second moment, in `[0, 1)`.
        epsilon: above 0; added to the root of the corrected second moment.
        weight_decay: :math:`\lambda`, 0 or more. (The default of optax is 1e-4.)
        amsgrad: True divides by the root of the largest second moment, as torch does.
        bias_correction: "row" counts the steps of each row in a slot; tables are then
            plain. None corrects nothing, keeps no count, and allows packed tables.
        catch_up: True makes up for the decay of weights and moments in the steps that a
            row has missed, before its next one; the bias correction then counts them
            too. An `EmbeddingState` counts
            them, `update` takes their number, `step=`; see `AdamRule`.
        lazy: True updates the rows that were looked up, False all rows.
        use_gradient_accumulation: as of `Optimizer`, like all that follow.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of its range, or two that exclude each other.

    Examples:
        >>> import jax.numpy as jnp
        >>> adamw = AdamW(0.25, weight_decay=0.5)
        >>> state = adamw.init(jnp.ones((2, 2)))
        >>> state = adamw.update(state, jnp.array([0]), jnp.ones((1, 2)))
        >>> print(state.table.round(4))  # 1 - 0.25 * 0.5 - 0.25, and as it was
        [[0.625 0.625]
         [1.    1.   ]]

    Source: I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019),
    algorithm 2; `torch.optim.AdamW` for the rate as a factor of the decay.
    """

    learning_rate: float | jax.Array | Callable[..., Any] = 1e-3
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    bias_correction: Literal["row"] | None = "row"
    catch_up: bool = False
    lazy: bool = True  # type: ignore[assignment]
    use_gradient_accumulation: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    slot_variable_creation_fn: SlotCreationFn | None = None
    clipvalue: float | tuple[float | None, float | None] | None = None

    def __post_init__(self) -> None:
        numbers.at_least_zero("weight_decay", self.weight_decay)
        super().__post_init__()

    @property
    def weight_decay_factor(self) -> float:  # type: ignore[override]
        """Returns the factor of the decay, before it is multiplied by the rate."""
        return self.weight_decay

    @property
    def multiply_weight_decay_factor_by_learning_rate(  # type: ignore[override]
        self,
    ) -> bool:
        """Returns True: the rate is a factor of the decay."""
        return True

    def make_rule(self) -> AdamRule:
        """Returns the rule that these arguments describe, without its rate."""
        return AdamRule(
            self.beta_1,
            self.beta_2,
            self.epsilon,
            sum_inside_sqrt=False,
            bias_correction=self.bias_correction,
            amsgrad=self.amsgrad,
            epsilon_hat=self.bias_correction is None,
            catch_up=self.catch_up,
        )

    def state_of(self, arrays: Sequence[jax.Array]) -> AnyAdamState:
        """Returns the arrays under their names."""
        return self.named(adam_kind(self.make_rule()), arrays)
