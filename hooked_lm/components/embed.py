"""The token embedding and the unembedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm.components.activations import soft_cap
from hooked_lm.components.norm import make_writing_norm
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookPoint


class Embed(nn.Module):
    """Token embedding, `W_E` [d_vocab d_model], with a norm after it where `post_embedding_ln` says so."""

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.ln = make_writing_norm(cfg) if cfg.post_embedding_ln else nn.Identity()

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.ln(F.embedding(tokens, self.W_E))


class Unembed(nn.Module):
    """From the normalised residual stream to logits: `W_U` [d_model d_vocab_out], `b_U` [d_vocab_out].

    `hook_out` is what the model returns: the soft-cap, if there is one, comes before it.
    """

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.cap = cfg.output_logits_soft_cap
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab_out))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab_out))
        self.hook_in = HookPoint("batch pos d_model")
        self.hook_out = HookPoint("batch pos vocab")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        logits = F.linear(self.hook_in(x), self.W_U.T, self._bias())
        return self.hook_out(soft_cap(logits, self.cap))

    def _bias(self) -> Tensor | None:
        """`b_U`, or None where adding it would change nothing.

        On the CPU a bias is first copied to every row of the output, the model's largest tensor by far. Looking at
        `b_U` costs next to nothing, and unprocessed models mostly have none.
        """
        needed = self.b_U.requires_grad and torch.is_grad_enabled()
        if needed or self.b_U.device.type != "cpu" or bool(self.b_U.any()):
            return self.b_U
        return None
