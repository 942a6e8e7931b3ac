"""The static half of an embedding: which features there are, and which tables.

An `EmbeddingLayout` is made from a user's nested `feature_config` once. It is hashable,
so it rides on the state as the static part of a pytree, and `jax.jit` keys on it.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from sparse_adam.embedding.config import FeatureConfig, check_optimizer
from sparse_adam.embedding.frozen import Frozen
from sparse_adam.embedding.optimizer import Optimizer
from sparse_adam.embedding.stacks import Stack, Table, make_stacks
from sparse_adam.ops.spread import Spread
from sparse_adam.rules import numbers as checks


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature: its name for messages, its path for subsets, and its table."""

    name: str
    path: str
    config: FeatureConfig
    table: int  # its number


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingLayout:
    """The features in the order of the flattened structure, and their tables.

    Attributes:
        structure: of the feature configuration, and so of ids and activations.
        features: one for each of its leaves.
        tables: in the order in which the features first name them.
        stacks: which of them share an array, and where each stands in it.
    """

    structure: Any  # a PyTreeDef
    features: tuple[Feature, ...]
    tables: tuple[Table, ...]
    stacks: tuple[Stack, ...]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, EmbeddingLayout) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.structure, self.features, self.tables, self.stacks

    @functools.cached_property
    def _hash(self) -> int:  # jit asks for it at every call
        return hash(self._key)

    def __repr__(self) -> str:
        features = [feature.name for feature in self.features]
        stacks = [[table.name for table in stack.tables] for stack in self.stacks]
        return f"EmbeddingLayout({features=}, {stacks=})"

    @functools.cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Returns of each table by name the number of its stack, and its own in it."""
        return {
            table.name: (number, place)
            for number, stack in enumerate(self.stacks)
            for place, table in enumerate(stack.tables)
        }

    @functools.cached_property
    def by_step(self) -> list[str]:
        """Returns the names of the tables whose updates depend on the step."""
        return [t.name for t in self.tables if t.optimizer.needs_step]

    def place(self, name: str) -> tuple[int, int]:
        """Returns the number of a table's stack, and the table's own number in it.

        Raises:
            KeyError: no table has this name.
        """
        if name not in self.places:
            raise KeyError(f"{name!r} is none of the tables {list(self.places)}")
        return self.places[name]

    def keys(self, key: jax.Array) -> dict[str, jax.Array]:
        """Returns by table name the key of its first weights, as `init` takes them."""
        keys = jax.random.split(key, len(self.tables))
        return {table.name: own for table, own in zip(self.tables, keys, strict=True)}

    def frozen(self) -> "EmbeddingLayout":
        """Returns the same with no table trainable: those of a stack share it still."""
        stacks = tuple(
            dataclasses.replace(stack, tables=tuple(map(_frozen, stack.tables)))
            for stack in self.stacks
        )
        tables = tuple(map(_frozen, self.tables))
        return dataclasses.replace(self, tables=tables, stacks=stacks)

    def leaves(self, what: str, tree: Any) -> list[Any]:
        """Returns what `tree` holds for each feature.

        Raises:
            ValueError: `tree` is not nested as the feature configuration is.
        """
        try:
            return self.structure.flatten_up_to(tree)
        except (TypeError, ValueError):
            raise ValueError(
                f"{what} must be nested as feature_config is, which has the features "
                f"{[feature.name for feature in self.features]}: "
                f"{self._difference(tree)}"
            ) from None

    def _difference(self, tree: Any) -> str:
        """Says how `tree` is nested otherwise; of arrays it shows shapes and dtypes."""

        def described(leaf: Any) -> Any:
            if not hasattr(leaf, "dtype"):
                return leaf
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)

        try:
            self.structure.flatten_up_to(jax.tree.map(described, tree))
        except (TypeError, ValueError) as error:
            return str(error)
        return f"it is {type(tree).__name__}"


def _frozen(table: Table) -> Table:
    return dataclasses.replace(table, optimizer=Frozen())


def make_layout(
    feature_config: Any,
    optimizer: Optimizer | None,
    *,
    stack: bool = True,
    spread: Spread | None = None,
) -> EmbeddingLayout:
    """Settles names, sharing, optimizers and stacks.

    Features that hold the same `TableConfig` object share a table.

    Args:
        feature_config: a nested structure of `FeatureConfig`s.
        optimizer: for the tables that have none of their own.
        stack: True lets tables that can share an array; see `make_stacks`.
        spread: the devices that share the rows of all tables.

    Raises:
        TypeError: `stack` is not True or False.
        ValueError: no features, something else among them, two tables of one name, or
            a table without an optimizer.
    """
    checks.flag("stack", stack)
    if optimizer is not None:
        check_optimizer(optimizer)
    paths, structure = jax.tree_util.tree_flatten_with_path(feature_config)
    if not paths:
        raise ValueError(f"{feature_config=} must hold at least one FeatureConfig")
    features: list[Feature] = []
    tables: dict[int, Table] = {}  # by identity of the TableConfig
    numbers: dict[int, int] = {}
    for path, config in paths:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(config, FeatureConfig):
            raise ValueError(
                f"feature_config has {config!r} at {where!r}; it must be a "
                "FeatureConfig, or a nested structure of them"
            )
        table = config.table
        if id(table) not in tables:
            numbers[id(table)] = number = len(tables)
            own = (table.optimizer or optimizer) if table.trainable else Frozen()
            name = f"table_{number}" if table.name is None else table.name
            if own is None:
                raise ValueError(
                    f"table {name!r} has no optimizer: pass one to its TableConfig, or "
                    "a global one"
                )
            if any(name == other.name for other in tables.values()):
                raise ValueError(
                    f"two tables have the name={name!r}: names must be unique. To "
                    "share a table, give features the same TableConfig object"
                )
            tables[id(table)] = Table(name, table, own)
        name = config.name or where or "feature"
        path_name = jax.tree_util.keystr(path)
        features.append(Feature(name, path_name, config, numbers[id(table)]))
    settled = tuple(tables.values())
    stacks = make_stacks(settled, stack, spread)
    return EmbeddingLayout(structure, tuple(features), settled, stacks)
