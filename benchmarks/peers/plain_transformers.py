"""`transformers` as it is, with PyTorch's own hooks where something is read or edited inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peers.contestant import HEAD, SCALE, Contestant, Task, Tokens, serve_contestant, undisturbed

Edit = Callable[[Tensor], Tensor | None]
# A module, its "input" or "output", and what sees it there. What is returned by one that sees an input takes its place.
Visit = tuple[Any, str, Edit]
# What is patched, by the classic patching module: the site, and what the numbers of a cell after its layer mean.
SITES = {
    ("resid_pre", "layer_pos_patch_setter"): ("stream", ("pos",)),
    ("z", "layer_head_vector_patch_setter"): ("head", ("head",)),
    ("z", "layer_pos_head_vector_patch_setter"): ("head", ("pos", "head")),
}


class Plain(Contestant):
    """A model of `transformers`."""

    ways = ("unprocessed", "processed")  # it has one way of loading, which both are compared with

    def __init__(self) -> None:
        super().__init__()
        self._corrupted = torch.zeros(1, 0, dtype=torch.long)
        self._clean: dict[tuple[str, int], Tensor] = {}

    def load_model(self, folder: Path, way: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(str(folder / "huggingface"), trust_remote_code=False)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    def tasks(self) -> Mapping[str, Callable[..., Task]]:
        return {
            "residual_cache": self.residual_cache,
            "hooked_stream": self.hooked_stream,
            "hooked_head": self.hooked_head,
            "attribution": self.attribution,
            "generate": self.generate,
        }

    # The parts of its models that go by different names

    @property
    def blocks(self) -> Sequence[Any]:
        return self.model.transformer.h if hasattr(self.model, "transformer") else self.model.model.layers

    def second_norm(self, layer: int) -> nn.Module:
        """Return what reads the stream between attention and MLP."""
        block = self.blocks[layer]
        return block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm

    def projection(self, layer: int) -> nn.Module:
        """Return what reads the heads' mixed values, side by side."""
        block = self.blocks[layer]
        return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj

    def run_through(self, tokens: Tensor, visits: Sequence[Visit]) -> Tensor:
        """Return the logits of a forward pass that makes some visits on its way.

        Args:
            tokens: [batch pos].
            visits: in the order in which the modules run.
        """
        handles = [AT[where](module, edit) for module, where, edit in visits]
        try:
            return self.logits(self.model, tokens)
        finally:
            for handle in handles:
                handle.remove()

    # Tasks

    def residual_cache(self, tokens: Tokens) -> Task:
        """A forward pass that keeps the residual stream: three activations a layer."""
        prompt = torch.tensor(tokens)

        def run() -> tuple[Tensor, dict[str, Tensor]]:
            kept: dict[str, Tensor] = {}

            def keep(name: str) -> Edit:
                return lambda x: kept.__setitem__(name, x)

            visits: list[Visit] = []
            for layer, block in enumerate(self.blocks):
                visits.append((block, "input", keep(f"blocks.{layer}.hook_resid_pre")))
                visits.append((self.second_norm(layer), "input", keep(f"blocks.{layer}.hook_resid_mid")))
                visits.append((block, "output", keep(f"blocks.{layer}.hook_resid_post")))
            return self.run_through(prompt, visits), kept

        return Task(run, lambda result: {"logits": result[0], **result[1]})

    def hooked_stream(self, tokens: Tokens, layer: int) -> Task:
        """A forward pass in which one hook scales the stream that enters a block."""
        return self._hooked(tokens, self.blocks[layer], lambda stream: SCALE * stream)

    def hooked_head(self, tokens: Tokens, layer: int) -> Task:
        """A forward pass in which one hook sets a head's output to zero."""

        def silence(z: Tensor) -> Tensor:
            self.by_head(z)[:, :, HEAD] = 0
            return z

        return self._hooked(tokens, self.projection(layer), silence)

    def _hooked(self, tokens: Tokens, module: Any, edit: Edit) -> Task:
        prompt = torch.tensor(tokens)
        return Task(lambda: self.run_through(prompt, [(module, "input", edit)]), lambda logits: {"logits": logits})

    def by_head(self, z: Tensor) -> Tensor:
        """Return a view of the heads' mixed values as [batch pos head d_head]."""
        return z.view(*z.shape[:2], self.model.config.num_attention_heads, -1)

    def attribution(self, tokens: Tokens, answer: int, wrong: int) -> Task:
        """A forward pass and the gradient of a logit difference at the stream that enters each block."""
        prompt = torch.tensor(tokens)

        def run() -> tuple[Tensor, ...]:
            streams: list[Tensor] = []

            def keep(stream: Tensor) -> Tensor:
                # Weights need no gradient, so the graph begins here.
                streams.append(stream if stream.requires_grad else stream.detach().requires_grad_())
                return streams[-1]

            logits = self.run_through(prompt, [(block, "input", keep) for block in self.blocks])
            return torch.autograd.grad(logits[0, -1, answer] - logits[0, -1, wrong], streams)

        return Task(run, lambda gradients: {"gradients": torch.stack(gradients)}, gradients=True)

    def generate(self, tokens: Tokens, new: int) -> Task:
        """The likeliest tokens, one by one."""
        prompt = torch.tensor(tokens)
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        self.model.generation_config.eos_token_id = None  # no token ends the text
        mask = torch.ones_like(prompt)
        return Task(lambda: self.generated(prompt, attention_mask=mask, **options), lambda tokens: {"tokens": tokens})

    def generated(self, tokens: Tensor, **options: Any) -> Tensor:
        """Return tokens [batch pos] with what follows them."""
        return self.model.generate(tokens, **options)

    # Patching

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        return {"set_prompts": self.set_prompts, "patch": self.patch}

    @torch.inference_mode()
    def set_prompts(self, clean: Tokens, corrupted: Tokens) -> None:
        """Run the clean prompts [batch pos] and keep what is patched."""
        self._corrupted = torch.tensor(corrupted)

        def keep(site: str, layer: int) -> Edit:
            return lambda x: self._clean.__setitem__((site, layer), x.clone())

        visits: list[Visit] = []
        for layer, block in enumerate(self.blocks):
            visits.append((block, "input", keep("stream", layer)))
            visits.append((self.projection(layer), "input", keep("head", layer)))
        self.run_through(torch.tensor(clean), visits)

    @torch.inference_mode()
    def patch(
        self, activation: str, setter: str, axes: Sequence[str], cells: Sequence[Sequence[int]], answer: int, wrong: int
    ) -> dict[str, Any]:
        """Return the seconds that some cells of a grid take, and their values."""
        site, axes = SITES[activation, setter]
        with undisturbed():
            start = perf_counter()
            values = [
                self._patched(site, layer, dict(zip(axes, place, strict=True)), answer, wrong)
                for layer, *place in cells
            ]
            seconds = perf_counter() - start
        return {"seconds": seconds, "values": values}

    def _patched(self, site: str, layer: int, place: Mapping[str, int], answer: int, wrong: int) -> float:
        clean = self._clean[site, layer]
        here = (slice(None), place.get("pos", slice(None)))

        def put_clean(x: Tensor) -> Tensor:
            x = x.clone()
            if site == "stream":
                x[here] = clean[here]
            else:
                self.by_head(x)[*here, place["head"]] = self.by_head(clean)[*here, place["head"]]
            return x

        module = self.blocks[layer] if site == "stream" else self.projection(layer)
        last = self.run_through(self._corrupted, [(module, "input", put_clean)])[:, -1]
        return (last[:, answer] - last[:, wrong]).mean().item()


def on_input(module: nn.Module, edit: Edit) -> Any:
    """Let a function see a module's first argument, and replace it by what it returns, if anything."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = edit(arguments[0])
        return None if changed is None else (changed, *arguments[1:])

    return module.register_forward_pre_hook(hook)


def on_output(module: nn.Module, see: Edit) -> Any:
    """Let a function see what a module returns, or the first of several things."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        see(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook)


AT: Mapping[str, Callable[[nn.Module, Edit], Any]] = {"input": on_input, "output": on_output}


if __name__ == "__main__":
    serve_contestant(Plain())
