"""Sparse Adam for embedding tables in JAX: it touches only the rows of the batch."""

from sparse_adam.embedding.adam import Adam as Adam
from sparse_adam.embedding.config import FeatureConfig as FeatureConfig
from sparse_adam.embedding.config import QuantizationConfig as QuantizationConfig
from sparse_adam.embedding.config import TableConfig as TableConfig
from sparse_adam.embedding.tpu_embedding import TPUEmbedding as TPUEmbedding
from sparse_adam.kernels.avoided import avoid_kernels as avoid_kernels
from sparse_adam.ops.explain import explain as explain
from sparse_adam.ops.lookup import lookup as lookup
from sparse_adam.ops.nearest import Nearest as Nearest
from sparse_adam.ops.nearest import nearest as nearest
from sparse_adam.ops.packed import PackedTable as PackedTable
from sparse_adam.ops.plan import UpdatePlan as UpdatePlan
from sparse_adam.ops.plan import plan_update as plan_update
from sparse_adam.ops.sparse_adam import AdamState as AdamState
from sparse_adam.ops.sparse_adam import (
    bias_corrected_learning_rate as bias_corrected_learning_rate,
)
from sparse_adam.ops.sparse_adam import packed_adam_update as packed_adam_update
from sparse_adam.ops.sparse_adam import sparse_adam_update as sparse_adam_update
from sparse_adam.ops.sparse_update import sparse_update as sparse_update

__version__ = "0.2.0"
