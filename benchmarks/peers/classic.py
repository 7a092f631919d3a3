"""The tasks in the classic interface, which three contestants share: the same calls for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contestant import HEAD, SCALE, Contestant, Task, Tokens, bytes_of

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
# Of a full cache, what is compared: one layer's activations of every kind that all of them name alike.
COMPARED = (*RESIDUAL, "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")


class Classic(Contestant):
    """A model with `run_with_cache`, `run_with_hooks` and `generate`."""

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens)

    def tasks(self) -> Mapping[str, Callable[..., Task]]:
        return {
            "residual_cache": self.residual_cache,
            "full_cache": self.full_cache,
            "hooked_stream": self.hooked_stream,
            "hooked_head": self.hooked_head,
            "attribution": self.attribution,
            "generate": self.generate,
        }

    def residual_cache(self, tokens: Tokens) -> Task:
        """A forward pass that keeps the residual stream: three activations a layer."""
        names = [f"blocks.{layer}.{site}" for layer in range(self.model.cfg.n_layers) for site in RESIDUAL]
        prompt = torch.tensor(tokens)
        return Task(lambda: self.model.run_with_cache(prompt, names_filter=names), lambda result: picked(result, names))

    def full_cache(self, tokens: Tokens, layer: int, **options: Any) -> Task:
        """A forward pass that keeps all activations that are kept by default."""
        names = [f"blocks.{layer}.{site}" for site in COMPARED]
        prompt = torch.tensor(tokens)
        return Task(
            lambda: self.model.run_with_cache(prompt, **options),
            lambda result: picked(result, names),
            held=lambda result: bytes_of(result[1].values()),
        )

    def hooked_stream(self, tokens: Tokens, layer: int) -> Task:
        """A forward pass in which one hook scales the stream that enters a block."""
        return self._hooked(tokens, f"blocks.{layer}.hook_resid_pre", lambda stream, hook: SCALE * stream)

    def hooked_head(self, tokens: Tokens, layer: int) -> Task:
        """A forward pass in which one hook sets a head's output to zero."""

        def silence(z: Tensor, hook: Any) -> Tensor:
            z[:, :, HEAD] = 0
            return z

        return self._hooked(tokens, f"blocks.{layer}.attn.hook_z", silence)

    def _hooked(self, tokens: Tokens, name: str, edit: Callable[[Tensor, Any], Tensor]) -> Task:
        prompt = torch.tensor(tokens)
        return Task(
            lambda: self.model.run_with_hooks(prompt, fwd_hooks=[(name, edit)]), lambda logits: {"logits": logits}
        )

    def attribution(self, tokens: Tokens, answer: int, wrong: int) -> Task:
        """A forward pass and the gradient of a logit difference at the stream that enters each block."""
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.model.cfg.n_layers)]
        prompt = torch.tensor(tokens)

        def run() -> tuple[Tensor, ...]:
            streams: list[Tensor] = []

            def keep(stream: Tensor, hook: Any) -> Tensor:
                # Weights need no gradient, so the graph begins here.
                streams.append(stream if stream.requires_grad else stream.detach().requires_grad_())
                return streams[-1]

            logits = self.model.run_with_hooks(prompt, fwd_hooks=[(name, keep) for name in names])
            return torch.autograd.grad(logits[0, -1, answer] - logits[0, -1, wrong], streams)

        return Task(run, lambda gradients: {"gradients": torch.stack(gradients)}, gradients=True)

    def generate(self, tokens: Tokens, new: int) -> Task:
        """The likeliest tokens, one by one."""
        prompt = torch.tensor(tokens)
        options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        return Task(
            lambda: self.model.generate(prompt, max_new_tokens=new, **options), lambda tokens: {"tokens": tokens}
        )


def picked(result: tuple[Tensor, Mapping[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """Return the logits and some activations of a run with cache."""
    logits, cache = result
    return {"logits": logits} | {name: cache[name] for name in names}
