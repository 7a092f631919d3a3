"""Generating text: decoding as functions, and the model's methods in `methods`."""

from hooked_lm.generation.decoding import Sampling, decode_steps, sample_logits

__all__ = ["Sampling", "decode_steps", "sample_logits"]
