"""Tensor parallelism: a model whose heads and neurons are shared out among processes, which all run the same code."""

from hooked_lm.parallel.contiguous import make_contiguous
from hooked_lm.parallel.loading import load, shard

__all__ = ["load", "make_contiguous", "shard"]
