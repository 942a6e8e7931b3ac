"""The embedding API on top of the op."""

import sparse_adam.embedding.exporting  # noqa: F401, it tells jax.export of types
from sparse_adam.embedding.adam import Adam as Adam
from sparse_adam.embedding.adamw import AdamW as AdamW
from sparse_adam.embedding.by_row import RowGradients as RowGradients
from sparse_adam.embedding.by_row import apply_row_gradients as apply_row_gradients
from sparse_adam.embedding.by_row import join_row_gradients as join_row_gradients
from sparse_adam.embedding.by_row import row_gradients as row_gradients
from sparse_adam.embedding.config import FeatureConfig as FeatureConfig
from sparse_adam.embedding.config import QuantizationConfig as QuantizationConfig
from sparse_adam.embedding.config import TableConfig as TableConfig
from sparse_adam.embedding.functional import apply_gradients as apply_gradients
from sparse_adam.embedding.functional import (
    current_learning_rates as current_learning_rates,
)
from sparse_adam.embedding.functional import init as init
from sparse_adam.embedding.functional import lookup as lookup
from sparse_adam.embedding.inputs import Ragged as Ragged
from sparse_adam.embedding.inputs import Sparse as Sparse
from sparse_adam.embedding.invalid import check_ids as check_ids
from sparse_adam.embedding.loading import pad_to_buckets as pad_to_buckets
from sparse_adam.embedding.loading import to_inputs as to_inputs
from sparse_adam.embedding.logical import from_logical as from_logical
from sparse_adam.embedding.logical import map_arrays as map_arrays
from sparse_adam.embedding.logical import to_logical as to_logical
from sparse_adam.embedding.neighbours import nearest as nearest
from sparse_adam.embedding.norm import gradient_norm as gradient_norm
from sparse_adam.embedding.optimizer import Optimizer as Optimizer
from sparse_adam.embedding.optimizers import FTRL as FTRL
from sparse_adam.embedding.optimizers import SGD as SGD
from sparse_adam.embedding.optimizers import Adagrad as Adagrad
from sparse_adam.embedding.optimizers import AdagradMomentum as AdagradMomentum
from sparse_adam.embedding.optimizers import RowWiseAdagrad as RowWiseAdagrad
from sparse_adam.embedding.optimizers import RuleOptimizer as RuleOptimizer
from sparse_adam.embedding.serving import (
    serving_embedding_lookup as serving_embedding_lookup,
)
from sparse_adam.embedding.serving import weights_only as weights_only
from sparse_adam.embedding.state import EmbeddingState as EmbeddingState
from sparse_adam.embedding.stats import BatchStats as BatchStats
from sparse_adam.embedding.stats import batch_stats as batch_stats
from sparse_adam.embedding.tpu_embedding import TPUEmbedding as TPUEmbedding
from sparse_adam.embedding.travel import explain as explain
