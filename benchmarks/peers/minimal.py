"""A GPT-2 written by hand in plain PyTorch, with nothing that could be left out: overhead is seen beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.contestant import Contestant, serve_contestant


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, d_model: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln_1 = nn.LayerNorm(d_model, eps)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.ln_2 = nn.LayerNorm(d_model, eps)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))

    def attend(self, x: Tensor) -> Tensor:
        batch, pos, d_model = x.shape
        q, k, v = self.qkv(x).view(batch, pos, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).reshape(batch, pos, d_model))


class MinimalGPT2(nn.Module):
    """Tokens [batch pos] in, logits [batch pos vocab] out.

    Args:
        fields: of a HuggingFace config.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        d_model, eps = fields["n_embd"], fields["layer_norm_epsilon"]
        self.tokens = nn.Embedding(fields["vocab_size"], d_model)
        self.positions = nn.Embedding(fields["n_positions"], d_model)
        self.blocks = nn.ModuleList([Block(d_model, fields["n_head"], eps) for _ in range(fields["n_layer"])])
        self.ln_f = nn.LayerNorm(d_model, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln_f(x), self.tokens.weight)

    @classmethod
    def from_folder(cls, folder: Path) -> MinimalGPT2:
        """Return the model of a HuggingFace folder."""
        model = cls(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(renamed(load_file(folder / "model.safetensors")))
        return model.eval()


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return HuggingFace's weights of a GPT-2 under the names used here; its projections are stored transposed."""
    names = {
        "transformer.": "",
        "wte.": "tokens.",
        "wpe.": "positions.",
        "h.": "blocks.",
        "attn.c_attn.": "qkv.",
        "attn.c_proj.": "out.",
        "mlp.c_fc.": "up.",
        "mlp.c_proj.": "down.",
    }
    result = {}
    for name, weight in weights.items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)  # noqa: PLW2901
        result[name] = weight.T.contiguous() if transposed else weight
    return result


class Minimal(Contestant):
    """The model above. It computes logits and nothing else."""

    def load_model(self, folder: Path, way: str) -> nn.Module:
        return MinimalGPT2.from_folder(folder / "huggingface")

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens)


if __name__ == "__main__":
    serve_contestant(Minimal())
