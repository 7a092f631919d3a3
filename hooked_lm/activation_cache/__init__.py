"""A run's activations by name, the residual stream taken apart, and how they are recorded, replayed and stored."""

from hooked_lm.activation_cache.decomposition import ActivationCache

__all__ = ["ActivationCache"]
