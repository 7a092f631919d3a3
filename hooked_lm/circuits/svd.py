"""Singular vectors of a model's matrices, read as tokens.

Source: Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.folded import folded_ov, folded_qk, read_through
from hooked_lm.circuits.full_circuits import token_embeddings
from hooked_lm.circuits.stock_only import (
    require_own_matrices,
    require_stock,
    require_stock_attention,
    require_stock_unembedding,
)
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooked_model import HookedModel

__all__ = ["Circuit", "CircuitVectors", "SVDInterpreter", "VectorType", "circuit_vectors"]

VectorType = Literal["OV", "w_in", "w_out"]
Circuit = Literal["OV", "QK"]


@dataclass(frozen=True, eq=False)
class CircuitVectors:
    """The leading singular vectors of a head's circuit, both sides of each as tokens.

    A vector and its partner may change sign together: here the partner's largest entry is positive.

    Attributes:
        circuit: `"OV"`: what the head reads (left) and what it then writes (right). `"QK"`: the query token (left) and
            the key token (right).
        values: the singular values, the largest first, [vector].
        left: `W_E` times the left vectors, [vocab vector].
        right: for `"OV"`, what the right vectors add to each logit by the direct path, up to the final norm's scale,
            [vocab_out vector]; for `"QK"`, `W_E` times the right vectors, [vocab vector].
    """

    circuit: Circuit
    values: Float[Tensor, " vector"]
    left: Float[Tensor, "vocab vector"]
    right: Float[Tensor, "vocab_out vector"]

    def top_tokens(self, vector: int, k: int = 5) -> tuple[list[int], list[int]]:
        """Return the tokens with the largest entries in a vector, on the left and on the right.

        Args:
            vector: its index, 0 for the largest singular value.
            k: how many tokens.

        Raises:
            ValueError: there is no such vector, or fewer tokens.
        """
        n_vectors, n_tokens = len(self.values), min(len(self.left), len(self.right))
        if not 0 <= vector < n_vectors or not 1 <= k <= n_tokens:
            raise ValueError(f"vectors are 0-{n_vectors - 1} and k is in 1-{n_tokens}; got vector {vector} and k {k}")
        left, right = (side[:, vector].topk(k).indices.tolist() for side in (self.left, self.right))
        return left, right


@torch.no_grad()
def circuit_vectors(
    model: HookedModel, layer: int, head: int, circuit: Circuit = "OV", n_vectors: int = 10
) -> CircuitVectors:
    """Return the leading singular vectors of a head's OV or QK circuit in vocabulary space.

    The linear part of the norms on the way is folded in; half precision is decomposed in float32.

    Args:
        model: a `HookedTransformer`.
        layer, head: the head.
        circuit: which of its two circuits.
        n_vectors: how many vectors, from the largest singular value down.

    Raises:
        ValueError: no such head or circuit, more vectors than the head has dimensions; norms stand where the circuit is
            no product of matrices; or a component on the way is overridden.
    """
    if circuit not in ("OV", "QK"):
        raise ValueError(f"circuit is 'OV' or 'QK', not {circuit!r}")
    if not 0 <= head < model.cfg.n_heads:
        raise ValueError(f"no head {head}: this model has heads 0-{model.cfg.n_heads - 1}")
    if not 1 <= n_vectors <= min(model.cfg.d_head, model.cfg.d_model):
        raise ValueError(f"n_vectors is in 1-{min(model.cfg.d_head, model.cfg.d_model)}; got {n_vectors}")
    if circuit == "OV":
        require_stock_unembedding(model, "an OV circuit in vocabulary space")
    U, S, V = (folded_ov if circuit == "OV" else folded_qk)(model, layer)[head].svd()
    embeddings = at_least_single(token_embeddings(model))
    unembed = read_through(model.ln_final, at_least_single(model.W_U)).T if circuit == "OV" else embeddings
    left = einsum(embeddings, U[:, :n_vectors], "vocab d_model, d_model vector -> vocab vector")
    right = einsum(unembed, V[:, :n_vectors], "vocab d_model, d_model vector -> vocab vector")
    sign = right.gather(0, right.abs().argmax(0, keepdim=True)).sign()
    return CircuitVectors(circuit, S[:n_vectors], left * sign, right * sign)


class SVDInterpreter:
    """The classic interface: projects the residual-stream side of singular vectors on the vocabulary.

    `circuit_vectors` shows both sides of a head's circuits, QK too.

    Args:
        model: a `HookedTransformer`.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.cfg = model.cfg

    def get_singular_vectors(
        self, vector_type: VectorType, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> Float[Tensor, "vocab 1 vector"]:
        """Return the projection of each leading singular vector on each token, [vocab 1 num_vectors].

        The projection is on `W_U` as it is: fold the final norm first (`from_pretrained` does) to have its gain in it.

        Args:
            vector_type: `"OV"` for what a head writes, `"w_in"` for what an MLP reads (with the gain of its norm, where
                that is not folded), `"w_out"` for what it writes.
            layer_index: the block.
            num_vectors: how many vectors, from the largest singular value down.
            head_index: the head; needed for `"OV"`, and without effect for the matrices of an MLP.

        Raises:
            ValueError: an unknown kind, an index out of range, more vectors than there are, or attention, MLP or norm
                are overridden.
        """
        if not 0 <= layer_index < self.cfg.n_layers:
            raise ValueError(f"layer {layer_index} is out of range: this model has blocks 0-{self.cfg.n_layers - 1}")
        self.model.unembed.require_linear("a singular vector in vocabulary space")
        V = self._right_singular_vectors(vector_type, layer_index, head_index).to(self.model.W_U.device)
        if not 1 <= num_vectors <= V.shape[-1]:
            raise ValueError(f"num_vectors {num_vectors} is not in 1-{V.shape[-1]}, the number of singular vectors")
        return (at_least_single(self.model.W_U).T @ V[:, :num_vectors])[:, None].detach()

    def _right_singular_vectors(self, vector_type: str, layer: int, head: int | None) -> Tensor:
        """[d_model rank], the largest singular value first."""
        block = self.model.blocks[layer]
        if vector_type not in ("OV", "w_in", "w_out"):
            raise ValueError(f"vector_type is 'OV', 'w_in' or 'w_out', not {vector_type!r}")
        if vector_type == "OV":
            if head is None or not 0 <= head < self.cfg.n_heads:
                raise ValueError(f"'OV' needs head_index in 0-{self.cfg.n_heads - 1}, got {head}")
            require_own_matrices(self.model, "an OV circuit", by_values=True)
            require_stock_attention(self.model, layer, "an OV circuit")
            group = self.cfg.n_heads // self.cfg.n_kv_heads
            W_V, W_O = (at_least_single(W) for W in (block.attn.W_V[head // group], block.attn.W_O[head]))
            return FactoredMatrix(W_V, W_O).svd()[2]
        if self.cfg.attn_only or self.cfg.num_experts is not None:
            raise ValueError("this model has no plain MLP to take the matrices of")
        require_stock("what an MLP reads and writes", f"blocks.{layer}.mlp", block.mlp)
        require_stock("what an MLP reads and writes", f"blocks.{layer}.ln2", block.ln2)
        if vector_type == "w_out":
            return _right_vectors(block.mlp.W_out)
        gain = getattr(block.ln2, "w", None)
        reads = at_least_single(block.mlp.W_in)
        reads = reads if gain is None else at_least_single(gain)[:, None] * reads
        return _right_vectors(reads.mT)


def _right_vectors(matrix: Float[Tensor, "row column"]) -> Float[Tensor, "column rank"]:
    Vh: Tensor = torch.linalg.svd(at_least_single(matrix), full_matrices=False).Vh
    return Vh.mT
