"""Edges between the parts of a model, scored as auto-circuit, EAP-IG and ACDC do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.hook_points import HookPoint

from tests.downstream.models import GPT2_LIKE, build, logit_difference, tokens

Hooks = list[tuple[str, Callable[..., Tensor | None]]]


def split_model() -> HookedTransformer:
    """Return a model with the inputs of heads and MLPs, and the results of heads, apart."""
    model = build(GPT2_LIKE)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    return model


def senders(model: HookedTransformer) -> list[tuple[str, int | None]]:
    """Return what writes to the residual stream, in order: hook name and head."""
    found: list[tuple[str, int | None]] = [("hook_embed", None), ("hook_pos_embed", None)]
    for layer in range(model.cfg.n_layers):
        found += [(f"blocks.{layer}.attn.hook_result", head) for head in range(model.cfg.n_heads)]
        found.append((f"blocks.{layer}.hook_mlp_out", None))
    return found


def receivers(model: HookedTransformer) -> list[tuple[str, int | None, int]]:
    """Return what reads from it, in order: hook name, head, and how many senders come before."""
    found: list[tuple[str, int | None, int]] = []
    for layer in range(model.cfg.n_layers):
        before = 2 + layer * (model.cfg.n_heads + 1)
        found += [
            (f"blocks.{layer}.hook_{part}_input", head, before) for part in "qkv" for head in range(model.cfg.n_heads)
        ]
        found.append((f"blocks.{layer}.hook_mlp_in", None, before + model.cfg.n_heads))
    last = model.cfg.n_layers - 1
    return [*found, (f"blocks.{last}.hook_resid_post", None, len(senders(model)))]


def part(activation: Tensor, head: int | None) -> Tensor:
    """Return a head's part of an activation, [batch pos d_model]."""
    return activation if head is None else activation[:, :, head]


def sent(model: HookedTransformer, cache: ActivationCache) -> Tensor:
    """Return what each sender wrote, [sender batch pos d_model]."""
    return torch.stack([part(cache[name], head).detach() for name, head in senders(model)])


def edge_attribution() -> dict[str, Tensor]:
    """Score all edges: the change in what is sent, times the gradient where it is read."""
    model = split_model()
    clean, corrupted = tokens(3, 8, seed=1), tokens(3, 8, seed=2)
    names = {name for name, _ in senders(model)}
    with torch.no_grad():
        _, clean_cache = model.run_with_cache(clean, names_filter=lambda name: name in names)
        _, corrupted_cache = model.run_with_cache(corrupted, names_filter=lambda name: name in names)
    change = sent(model, corrupted_cache) - sent(model, clean_cache)

    gradients: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        gradients[hook.name] = gradient.clone()

    for name in {name for name, _, _ in receivers(model)}:
        model.add_hook(name, keep, "bwd")
    logit_difference(model(clean)).backward()
    model.reset_hooks()
    scores = torch.zeros(len(senders(model)), len(receivers(model)), dtype=torch.float64)
    for column, (name, head, before) in enumerate(receivers(model)):
        scores[:before, column] = torch.einsum("sbpd,bpd->s", change[:before], part(gradients[name], head))
    return {"scores": scores}


def integrated_edge_attribution(steps: int = 5) -> dict[str, Tensor]:
    """Score the edges with gradients at points between the two embeddings, gathered within hooks."""
    model = split_model()
    clean, corrupted = tokens(3, 8, seed=1), tokens(3, 8, seed=2)
    mask = torch.ones_like(clean)
    difference = torch.zeros(3, 8, len(senders(model)), model.cfg.d_model, dtype=torch.float64)
    scores = torch.zeros(len(senders(model)), len(receivers(model)), dtype=torch.float64)

    def send(index: int, head: int | None, sign: int, activation: Tensor, hook: HookPoint) -> None:
        difference[:, :, index] += sign * part(activation.detach(), head)

    def receive(index: int, head: int | None, before: int, gradient: Tensor, hook: HookPoint) -> None:
        read = part(gradient.detach(), head)
        scores[:before, index] += torch.einsum("bpsd,bpd->s", difference[:, :, :before], read) / steps

    def hooks(sign: int) -> Hooks:
        return [(name, partial(send, index, head, sign)) for index, (name, head) in enumerate(senders(model))]

    def between(step: int, activation: Tensor, hook: HookPoint, start: Tensor, end: Tensor) -> Tensor:
        point = start + (step / steps) * (end - start)
        return point.requires_grad_(True)

    with torch.no_grad():
        with model.hooks(fwd_hooks=hooks(1)):
            model(corrupted, attention_mask=mask)
        with model.hooks(fwd_hooks=hooks(-1)):
            model(clean, attention_mask=mask)
        start, end = model.embed(clean), model.embed(corrupted)
    backward = [(name, partial(receive, i, head, before)) for i, (name, head, before) in enumerate(receivers(model))]
    for step in range(steps):
        forward = [("hook_embed", partial(between, step, start=start, end=end))]
        with model.hooks(fwd_hooks=forward, bwd_hooks=backward):
            logit_difference(model(clean, attention_mask=mask)).backward()
        model.zero_grad()
    return {"scores": scores}


def pruned_edges(threshold: float = 0.01) -> dict[str, Tensor]:
    """Take edges away, from the last reader to the first, where the output hardly changes.

    An edge that is away carries what its sender wrote on the corrupted prompt. Hooks keep what is sent in this run in a
    context that the readers' hooks read.
    """
    model = split_model()
    clean, corrupted = tokens(2, 6, seed=3), tokens(2, 6, seed=4)
    _, cache = model.run_with_cache(corrupted)
    elsewhere = sent(model, cache)
    kept = torch.ones(len(senders(model)), len(receivers(model)), dtype=torch.bool)
    now: dict[int, Tensor] = {}

    def send(index: int, head: int | None, activation: Tensor, hook: HookPoint) -> None:
        now[index] = part(activation, head)

    def receive(index: int, head: int | None, before: int, activation: Tensor, hook: HookPoint) -> Tensor:
        away = [sender for sender in range(before) if not kept[sender, index]]
        for sender in away:
            if head is None:
                activation = activation + elsewhere[sender] - now[sender]
            else:
                activation[:, :, head] += elsewhere[sender] - now[sender]
        return activation

    for index, (name, head) in enumerate(senders(model)):
        model.add_hook(name, partial(send, index, head))
    for index, (name, head, before) in enumerate(receivers(model)):
        model.add_hook(name, partial(receive, index, head, before))
    with torch.no_grad():
        whole = model(clean)[:, -1].log_softmax(-1)

        def divergence() -> float:
            pruned = model(clean)[:, -1].log_softmax(-1)
            return float((whole.exp() * (whole - pruned)).sum(-1).mean())

        current, course = divergence(), []
        for index, (_, _, before) in reversed(list(enumerate(receivers(model)))):
            kept[before:, index] = False
            for sender in reversed(range(before)):
                kept[sender, index] = False
                changed = divergence()
                if changed - current < threshold:
                    current = changed
                else:
                    kept[sender, index] = True
                course.append(changed)
    return {"kept": kept.double(), "divergences": torch.tensor(course, dtype=torch.float64)}
