"""`TPUEmbedding`: the object of TensorFlow's name, on top of the functional core.

It holds a state and a queue of batches; it adds no numbers of its own.
"""

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from sparse_adam._types import ImplementationName, Rounding, Storage
from sparse_adam.embedding import functional, on_mesh, steps
from sparse_adam.embedding.config import TableConfig, is_int
from sparse_adam.embedding.exclusive import exclusive
from sparse_adam.embedding.gradients import check_gradients, warn_of_missing_gradients
from sparse_adam.embedding.host import (
    batch_size_of,
    check_batch_size,
    ready_for_jit,
    some_ready_for_jit,
)
from sparse_adam.embedding.invalid import OnInvalidIds, check_argument, check_if_asked
from sparse_adam.embedding.logical import from_logical, to_logical
from sparse_adam.embedding.optimizer import Optimizer
from sparse_adam.embedding.rates import rates_of_host
from sparse_adam.embedding.state import ByTable, EmbeddingState, owned
from sparse_adam.embedding.steps import QueuedBatch, Update
from sparse_adam.embedding.tables import make_layout
from sparse_adam.ops import dispatch
from sparse_adam.rules import numbers


class TPUEmbedding:
    """Embedding tables, looked up and trained through a queue of batches.

    The calls of `tf.tpu.experimental.embedding.TPUEmbedding`, on whatever device JAX
    computes on. A training step enqueues a batch, dequeues its activations and applies
    the gradients by them. Inside `jax.jit` use the functional core instead: this object
    changes in place, and refuses to be traced.

    A call that raises changes nothing: the state, the queue and an update that is under
    way stay as they were, and what is wrong with a batch or with gradients is told by
    the call that is given them. Threads may share an object: each call runs alone. So
    one may enqueue while another one trains, and a third one looks up. Arrays that were
    taken out (`state`, `embedding_tables`) are donated by the next update all the same.

    Args:
        feature_config: a `FeatureConfig`, or a nested structure of them. Features that
            hold the same `TableConfig` object share a table.
        optimizer: for the tables that have none of their own.
        pipeline_execution_with_tensor_core: True lets the lookup of a training batch
            run ahead of the update before it: activations are one step old. Anything
            that reads the tables in between (`embedding_tables`, `retrieve`, `state`,
            inference) first finishes the update that is under way.
        batch_size: the number of samples that every feature has; None is not checked.
        storage: "plain" or "packed" tables, as in `init`; all methods take and return
            logical arrays in either case.
        stack: True lets tables that are alike share an array, as in `init`.
        rounding: of bfloat16 tables and slots, "nearest" or "stochastic", as in
            `apply_gradients`.
        mesh: whose devices share tables and batches, as in `init`.
        axes: of the mesh, over which they are spread, as in `init`.
        seed: of stochastic rounding: each update has a key of its own, made of the seed
            and of how many updates this object has made. Pass another one when you go
            on from a checkpoint.
        implementation: of the update, as in `sparse_adam_update`.
        on_invalid_ids: "ignore", or "error": `enqueue` and a call of the object refuse
            ids as `check_ids` does. Pass NumPy arrays: it waits for those of JAX.

    Raises:
        TypeError: see `init`.
        ValueError: see `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from sparse_adam.embedding import (
        ...     Adam, FeatureConfig, TableConfig, TPUEmbedding)
        >>> video = TableConfig(vocabulary_size=8, dim=4, optimizer=Adam(0.2))
        >>> user = TableConfig(vocabulary_size=16, dim=2)
        >>> embedding = TPUEmbedding(
        ...     feature_config=(FeatureConfig(video), FeatureConfig(user)),
        ...     optimizer=Adam(0.1))
        >>> before = embedding.retrieve()
        >>> embedding.enqueue((jnp.array([3, 0]), jnp.array([5, 5])))
        >>> activations = embedding.dequeue()
        >>> embedding.apply_gradients(jax.tree.map(jnp.ones_like, activations))
        >>> for name, was in before.items():
        ...     moved = was["parameters"] - embedding.embedding_tables[name]
        ...     print(name, moved.max().round(4))
        table_0 0.6325
        table_1 0.3162

    Source: `tensorflow/python/tpu/tpu_embedding_v2.py`.
    """

    def __init__(
        self,
        feature_config: Any,
        optimizer: Optimizer | None = None,
        pipeline_execution_with_tensor_core: bool = False,
        *,
        batch_size: int | None = None,
        storage: Storage | None = None,
        stack: bool = True,
        rounding: Rounding = "nearest",
        mesh: jax.sharding.Mesh | None = None,
        axes: str | Sequence[str] | None = None,
        seed: int = 0,
        implementation: ImplementationName | None = None,
        on_invalid_ids: OnInvalidIds = "ignore",
    ) -> None:
        self._on_invalid_ids: OnInvalidIds = check_argument(on_invalid_ids)
        self._feature_config = feature_config
        self._optimizer = optimizer
        spread = on_mesh.spread_of(mesh, axes)
        self._layout = make_layout(
            feature_config, optimizer, stack=stack, spread=spread
        )
        self._pipelined = numbers.flag(
            "pipeline_execution_with_tensor_core", pipeline_execution_with_tensor_core
        )
        self._batch_size = batch_size_of("batch_size", batch_size)
        dispatch.storage(1, storage)
        if implementation not in (None, *dispatch.NAMES):
            raise ValueError(
                f"{implementation=} must be None or one of {dispatch.NAMES}"
            )
        if not is_int(seed):
            raise TypeError(f"{seed=} must be an int")
        self._init_options: dict[str, Any] = {
            "storage": storage,
            "stack": stack,
            "mesh": mesh,
            "axes": axes,
        }
        self._how = {"rounding": rounding, "implementation": implementation}
        self._noise = None if rounding == "nearest" else jax.random.key(seed)
        self._layout.tables[0].optimizer.options(
            learning_rate=0.0, rounding=rounding, key=self._noise
        )
        self._num_updates = 0
        self._state: EmbeddingState | None = None
        self._enqueued: collections.deque[QueuedBatch] = collections.deque()
        self._looked_up: QueuedBatch | None = None  # its gradients are awaited
        self._under_way: Update | None = None  # only if pipelined
        self._checks = steps.Checks(self._layout)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        built = "built" if self._state is not None else "not built"
        return f"TPUEmbedding({self._layout!r}, {built})"

    @exclusive
    def build(
        self,
        per_replica_input_shapes: Any = None,
        per_replica_batch_size: int | None = None,
        *,
        key: jax.Array | None = None,
    ) -> None:
        """Makes the tables and their slots. A built one stays as it is.

        The first use of the object builds it, if this was not called.

        Args:
            per_replica_input_shapes: for TensorFlow's sake: shapes are read from ids.
            per_replica_batch_size: as `batch_size`, if that was not given.
            key: for the first weights; None is `jax.random.key(0)`.

        Raises:
            RuntimeError: there is a `key`, but the tables are built already.
        """
        del per_replica_input_shapes
        if self._batch_size is None:
            self._batch_size = batch_size_of(
                "per_replica_batch_size", per_replica_batch_size
            )
        if self._state is not None:
            if key is not None:
                raise RuntimeError(
                    "build(key=...) came after the tables were built: call it before "
                    "the first use, or make a new TPUEmbedding"
                )
            return
        key = jax.random.key(0) if key is None else key
        self._state = functional.init(
            self._feature_config, self._optimizer, key, **self._init_options
        )

    @property
    @exclusive
    def state(self) -> EmbeddingState:
        """The state of the functional core: to checkpoint, or to go on without this.

        The next `apply_gradients` donates its arrays: copy what is to be kept. Assign
        to it what a checkpoint restored. What is not a table of its layout's shape is
        refused.
        """
        self._finish_update()
        return self._built_state()

    @state.setter
    @exclusive
    def state(self, state: EmbeddingState) -> None:
        if not isinstance(state, EmbeddingState):
            raise TypeError(
                f"state is {type(state).__name__}; it must be an EmbeddingState, as "
                "init returns: pass load() a dict of arrays"
            )
        if state.layout != self._layout:
            raise ValueError(
                f"{state.layout=} must be that of this object, {self._layout}: make "
                "both from one feature_config, optimizer, stack=, mesh= and axes=, or "
                "load() what to_logical(state) returns"
            )
        state = owned(state)
        self._finish_update()
        self._state = state

    @property
    @exclusive
    def embedding_tables(self) -> Mapping[str | TableConfig, jax.Array]:
        """The weights `[V, D]`, by table name or by the `TableConfig` object.

        The next `apply_gradients` donates these arrays: copy what is to be kept.
        """
        return ByTable(self._layout, self.state.table)

    @exclusive
    def enqueue(
        self,
        features: Any,
        weights: Any = None,
        training: bool = True,
        name: str | None = None,
        device: str | None = None,
    ) -> None:
        """Puts a batch at the end of the queue.

        Args:
            features: ids, as in `lookup`; NumPy arrays may be 64-bit.
            weights: as in `lookup`.
            training: False for a batch that gets no `apply_gradients`.
            name: for TensorFlow's sake; without effect.
            device: for TensorFlow's sake; without effect.

        Raises:
            TypeError: ids are not integers.
            ValueError: another structure than the configuration's, another number of
                samples than `batch_size`, or ids or weights that do not fit, as in
                `lookup`.
        """
        del name, device
        features, weights = self._ready(features, weights)
        check_batch_size(self._layout, features, self._batch_size)
        shapes = self._checks.activation_shapes(features, weights)
        self._enqueued.append(QueuedBatch(features, weights, bool(training), shapes))

    @exclusive
    def dequeue(self, name: str | None = None) -> Any:
        """Looks up the batch at the front of the queue.

        Returns:
            Its activations, as `lookup` returns them.

        Raises:
            RuntimeError: the queue is empty, or the gradients of the training batch
                before have not been applied.
        """
        del name
        if not self._enqueued:
            raise RuntimeError("dequeue() found no batch: call enqueue(features) first")
        batch = self._enqueued[0]
        if batch.training and self._looked_up is not None:
            raise RuntimeError(
                "dequeue() of a training batch came before the gradients of the one "
                "before it: call apply_gradients, or enqueue with training=False"
            )
        if not batch.training:
            self._finish_update()
        activations = steps.lookup(self._built_state(), batch.features, batch.weights)
        if batch.training:
            self._finish_update()  # of the batch before: only now, if pipelined
            self._looked_up = batch
        self._enqueued.popleft()
        return activations

    @exclusive
    def apply_gradients(
        self,
        gradients: Any,
        name: str | None = None,
        *,
        gradient_scale: ArrayLike | None = None,
    ) -> None:
        """Updates the rows of the training batch that was dequeued last.

        Learning rates that are callables without arguments are called now, each once;
        this counts one step for those that are functions of the step.

        Args:
            gradients: by the activations, in their structure. None counts as zeros,
                with a warning.
            name: for TensorFlow's sake; without effect.
            gradient_scale: as in the function `apply_gradients`.

        Raises:
            RuntimeError: no training batch was dequeued.
            TypeError: a gradient that is no array of floats, or a scale that is no
                number.
            ValueError: another structure or shape than the activations'; a scale that
                is no scalar.
        """
        del name
        if self._looked_up is None:
            raise RuntimeError(
                "apply_gradients() has no batch: each one takes the gradients of one "
                "enqueue(..., training=True) and dequeue()"
            )
        batch = self._looked_up
        leaves = check_gradients(self._layout, gradients, batch.shapes)
        warn_of_missing_gradients(self._layout, gradients, stacklevel=4)
        gradients = jax.tree.unflatten(self._layout.structure, leaves)
        update = Update.of(
            batch,
            gradients,
            rates_of_host(self._layout.tables),
            gradient_scale,
            self._num_updates,
        )
        if self._pipelined:
            self._checks.update(self._built_state(), update, self._noise, **self._how)
            self._under_way = update
        else:
            self._state = self._updated(update)
        self._looked_up = None
        self._num_updates += 1

    @exclusive
    def __call__(self, features: Any, weights: Any = None) -> Any:
        """Looks up a batch of all features, past the queue and without an update.

        Takes and returns what `lookup` does.
        """
        features, weights = self._ready(features, weights)
        return steps.lookup(self.state, features, weights)

    @exclusive
    def serving_embedding_lookup(self, features: Any, weights: Any = None) -> Any:
        """Looks up some of the features, as the function of this name does."""
        features, weights = some_ready_for_jit(features, weights)
        return steps.serve(self.state, features, weights)

    @exclusive
    def retrieve(self) -> dict[str, dict[str, np.ndarray]]:
        """Copies all tables to the host.

        Returns:
            By table name, `parameters` and, for `Adam`, `momenta` and `velocities`:
            `[V, D]` each.
        """
        return {
            name: {slot: np.array(array) for slot, array in own.items()}
            for name, own in to_logical(self.state).items()
        }

    @exclusive
    def load(self, tables: Mapping[str, Mapping[str, ArrayLike]]) -> None:
        """Replaces arrays by those of `tables`, which is like what `retrieve` returns.

        Tables and arrays that it leaves out stay as they are. The new arrays take the
        dtype and the sharding of the old.

        Raises:
            TypeError: a table that is no dict of arrays by name.
            ValueError: an unknown table or array name, or another shape.
        """
        self._state = from_logical(self.state, tables)

    def _ready(self, features: Any, weights: Any) -> tuple[Any, Any]:
        check_if_asked(self._layout, features, self._on_invalid_ids)
        return ready_for_jit(self._layout, features, weights)

    def _built_state(self) -> EmbeddingState:
        self.build()
        assert self._state is not None
        return self._state

    def _finish_update(self) -> None:
        if self._under_way is not None:
            self._state = self._updated(self._under_way)
            self._under_way = None

    def _updated(self, update: Update) -> EmbeddingState:
        return steps.update(self._built_state(), update, self._noise, **self._how)
