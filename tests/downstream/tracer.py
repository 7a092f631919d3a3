"""Attribution through frozen norms, patterns and MLPs, as circuit-tracer computes it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from tests.downstream.models import GEMMA_LIKE, build, tokens


class WatchedMLP(nn.Module):
    """An MLP with hook points at its input and its output."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(self.mlp(self.hook_in(x)))


class WatchedUnembed(nn.Module):
    """An unembedding with hook points before and after."""

    def __init__(self, unembed: nn.Module) -> None:
        super().__init__()
        self.unembed = unembed
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    @property
    def W_U(self) -> Tensor:
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        return self.unembed.b_U

    def forward(self, x: Tensor) -> Tensor:
        return self.hook_post(self.unembed(self.hook_pre(x)))


class Frozen(HookedTransformer):
    """A model that is linear in its embeddings, in what its MLPs add, and in a linear path around each MLP."""

    def freeze(self, skips: Tensor) -> None:
        """Replace parts and add permanent hooks.

        Args:
            skips: [layer d_model d_model], the paths around the MLPs.
        """
        for block in self.blocks:
            block.mlp = WatchedMLP(block.mlp)
        self.unembed = WatchedUnembed(self.unembed)
        for layer, block in enumerate(self.blocks):
            self._add_skip(block, skips[layer])
            scales = (block.ln1, block.ln2, block.ln1_post, block.ln2_post, self.ln_final)
            for point in (block.attn.hook_pattern, *(norm.hook_scale for norm in scales)):
                point.add_hook(lambda activation, hook: activation.detach(), is_permanent=True)
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.hook_embed.add_hook(self._start_graph, is_permanent=True)
        self._share_buffers()
        self.setup()

    @staticmethod
    def _start_graph(activation: Tensor, hook: HookPoint) -> Tensor:
        activation.requires_grad = True
        return activation

    @staticmethod
    def _add_skip(block: Any, weight: Tensor) -> None:
        """Give an MLP's output the gradient of a linear path, and leave its value."""
        kept: dict[str, Tensor] = {}
        block.mlp.hook_out.hook_out_grad = HookPoint()

        def keep(activation: Tensor, hook: HookPoint) -> None:
            kept["x"] = activation

        def skip(activation: Tensor, hook: HookPoint, grad_hook: HookPoint) -> Tensor:
            path = kept.pop("x") @ weight
            return grad_hook(path + (activation - path).detach())

        block.mlp.hook_in.add_hook(keep, is_permanent=True)
        block.mlp.hook_out.add_hook(partial(skip, grad_hook=block.mlp.hook_out.hook_out_grad), is_permanent=True)

    def _share_buffers(self) -> None:
        """Let all blocks of one kind of attention have the same mask."""
        masks = {block.attn.attn_type: block.attn.mask for block in self.blocks}
        for block in self.blocks:
            block.attn.mask = masks[block.attn.attn_type]


def traced_attribution() -> dict[str, Tensor]:
    """Attribute a logit difference, before the soft cap, to the embeddings and to what each MLP adds to its skip path.

    The parts sum to the difference: the model has no biases.
    """
    generator = torch.Generator().manual_seed(5)
    skips = 0.2 * torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    model = build(GEMMA_LIKE, Frozen)
    prompt = tokens(1, 10, seed=6)
    capped = model(prompt)
    model.freeze(skips)
    names = [f"blocks.{layer}.mlp.hook_{side}" for layer in range(2) for side in ("in", "out.hook_out_grad")]
    plain = model(prompt)
    cap, model.cfg.output_logits_soft_cap = model.cfg.output_logits_soft_cap, 0.0
    cache, caching, _ = model.get_caching_hooks(lambda name: name in names or name == "hook_embed")
    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        gradients[hook.name] = gradient

    backward = [(name, keep) for name in ("hook_embed", *names[1::2])]
    with model.hooks(fwd_hooks=caching, bwd_hooks=backward):
        logits = model(prompt)
        target = logits[0, -1, 3] - logits[0, -1, 7]
        target.backward()
    model.cfg.output_logits_soft_cap = cap
    embedding = (gradients["hook_embed"] * cache["hook_embed"]).sum(-1)[0]
    added = torch.stack(
        [
            (gradients[out] * (cache[out] - cache[into] @ skips[layer])).sum(-1)[0]
            for layer, (into, out) in enumerate(zip(names[::2], names[1::2], strict=True))
        ]
    ).detach()
    return {
        "capped": capped[0, -1].detach(),
        "frozen": plain[0, -1].detach(),
        "embedding": embedding.detach(),
        "mlp": added,
        "target": target.detach(),
        "sum": (embedding.sum() + added.sum()).detach(),
    }
