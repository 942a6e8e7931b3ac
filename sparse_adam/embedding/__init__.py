"""The embedding API on top of the op."""

from sparse_adam.embedding.adam import Adam as Adam
