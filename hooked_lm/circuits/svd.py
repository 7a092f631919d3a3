"""Singular vectors of a model's matrices, read as tokens (Millidge and Black 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm.factored_matrix import FactoredMatrix

VectorType = Literal["OV", "w_in", "w_out"]


class SVDInterpreter:
    """Projects the residual-stream side of singular vectors on the vocabulary.

    Args:
        model: a `HookedTransformer`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg

    def get_singular_vectors(
        self, vector_type: VectorType, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> Float[Tensor, "vocab 1 vector"]:
        """Return what each of the leading singular vectors says about each token, [vocab 1 num_vectors].

        The projection is on `W_U` as it is: fold the final norm first (`from_pretrained` does) to have its gain in it.

        Args:
            vector_type: `"OV"` for what a head writes, `"w_in"` for what an MLP reads (with the gain of its norm, where
                that is not folded), `"w_out"` for what it writes.
            layer_index: the block.
            num_vectors: how many, from the largest singular value down.
            head_index: the head, for `"OV"` and only there.

        Raises:
            ValueError: an unknown kind, an index out of range, or more vectors than there are.
        """
        if not 0 <= layer_index < self.cfg.n_layers:
            raise ValueError(f"layer {layer_index} is out of range: this model has blocks 0-{self.cfg.n_layers - 1}")
        V = self._right_singular_vectors(vector_type, layer_index, head_index)
        if not 1 <= num_vectors <= V.shape[-1]:
            raise ValueError(f"num_vectors {num_vectors} is not in 1-{V.shape[-1]}, the singular vectors there are")
        return (self.model.W_U.T @ V[:, :num_vectors])[:, None].detach()

    def _right_singular_vectors(self, vector_type: str, layer: int, head: int | None) -> Tensor:
        """[d_model rank], the largest singular value first."""
        block = self.model.blocks[layer]
        if vector_type not in ("OV", "w_in", "w_out"):
            raise ValueError(f"vector_type is 'OV', 'w_in' or 'w_out', not {vector_type!r}")
        if vector_type == "OV":
            if head is None or not 0 <= head < self.cfg.n_heads:
                raise ValueError(f"'OV' needs head_index in 0-{self.cfg.n_heads - 1}, got {head}")
            group = self.cfg.n_heads // self.cfg.n_kv_heads
            return FactoredMatrix(block.attn.W_V[head // group], block.attn.W_O[head]).svd()[2]
        if head is not None:
            raise ValueError(f"{vector_type!r} belongs to a whole MLP: give no head_index")
        if self.cfg.attn_only or self.cfg.num_experts is not None:
            raise ValueError("this model has no plain MLP to take the matrices of")
        if vector_type == "w_out":
            return torch.linalg.svd(block.mlp.W_out, full_matrices=False).Vh.mT
        gain = getattr(block.ln2, "w", None)
        reads = block.mlp.W_in if gain is None else gain[:, None] * block.mlp.W_in
        return torch.linalg.svd(reads.mT, full_matrices=False).Vh.mT
