"""Experiments as tutorials teach them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers, tokens
from tests.classic.scenario import Outcome, scenario

CLEAN, CORRUPTED = tokens(1, 5), tokens(1, 5, name="corrupted")


def _metric(logits: Any) -> Any:
    return logits[0, -1, 3] - logits[0, -1, 5]


def _heads(model: Any) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


@scenario("attn_only", "rotary", "shortformer", "grouped")
def induction_scores(lib: Library, model: Any) -> Outcome:
    """Attention from each token of a repeated sequence to the one after its first occurrence, by hooks."""
    half = tokens(3, 5, name="repeated")
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def score(pattern: Any, hook: Any) -> None:
        scores[hook.layer()] = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 5).mean((0, -1)).detach()

    filter_ = lambda name: name.endswith("pattern")  # noqa: E731
    model.run_with_hooks(torch.cat([half, half], -1), return_type=None, fwd_hooks=[(filter_, score)])
    return {"scores": scores}


@scenario("plain", "ln_pre", "rms", "llama")
def logit_lens(lib: Library, model: Any) -> Outcome:
    logits, cache = model.run_with_cache(CLEAN)
    streams, labels = cache.accumulated_resid(layer=-1, incl_mid=True, return_labels=True)
    seen = torch.stack([model.unembed(model.ln_final(stream)) for stream in streams])
    return {
        "seen": seen,
        "labels": labels,
        "last": bool(torch.allclose(logits, model.unembed(model.ln_final(cache["resid_post", -1])), atol=1e-5)),
    }


@scenario("ln_pre", "rms_pre", "no_norm")
def direct_logit_attribution(lib: Library, model: Any) -> Outcome:
    _, cache = model.run_with_cache(tokens(2, 5))
    right, wrong = torch.tensor([3, 4]), torch.tensor([5, 6])
    directions = model.tokens_to_residual_directions(right) - model.tokens_to_residual_directions(wrong)
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return {
        "heads": (scaled * directions).sum(-1),
        "directions": directions,
        "layers": cache.decompose_resid(layer=-1, pos_slice=-1),
    }


@scenario("plain", "rotary", "parallel")
def attribution_patching(lib: Library, model: Any) -> Outcome:
    """Gradients of the corrupted run times differences of activations, with caches made by hooks of both directions."""

    def cached(given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model.reset_hooks()
        forward: dict[str, Any] = {}
        backward: dict[str, Any] = {}
        keep = lambda name: "_input" not in name and name.endswith(("resid_pre", "hook_z", "attn_out"))  # noqa: E731

        def store(into: dict[str, Any], value: Any, hook: Any) -> None:
            into[hook.name] = value.detach()

        model.add_hook(keep, partial(store, forward), "fwd")
        model.add_hook(keep, partial(store, backward), "bwd")
        _metric(model(given)).backward()
        model.reset_hooks()
        return forward, backward

    clean, _ = cached(CLEAN)
    corrupted, gradients = cached(CORRUPTED)
    return {name: (gradients[name] * (clean[name] - corrupted[name])).sum(-1) for name in sorted(gradients)}


@scenario("plain", "grouped", "attn_only")
def path_patching(lib: Library, model: Any) -> Outcome:
    """From each head to the final residual: others frozen, the receiver kept, then patched in."""
    z = lambda name: name.endswith("hook_z")  # noqa: E731
    _, clean = model.run_with_cache(CLEAN, names_filter=z, return_type=None)
    _, other = model.run_with_cache(CORRUPTED, names_filter=z, return_type=None)
    final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    grid = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def freeze(sender: tuple[int, int], value: Any, hook: Any) -> Any:
        value[...] = clean[hook.name][...]
        if hook.layer() == sender[0]:
            value[:, :, sender[1]] = other[hook.name][:, :, sender[1]]
        return value

    for sender in _heads(model):
        model.add_hook(z, partial(freeze, sender), level=1)
        _, kept = model.run_with_cache(CLEAN, names_filter=lambda name: name == final, return_type=None)
        model.reset_hooks()
        patched = model.run_with_hooks(CLEAN, fwd_hooks=[(final, lambda value, hook, kept=kept: kept[final])])
        grid[sender] = _metric(patched).detach()
    return {"grid": grid}


@scenario("plain", "alibi", "gated")
def causal_tracing(lib: Library, model: Any) -> Outcome:
    noise = 0.5 * numbers("noise", (1, 5, 8))
    _, clean = model.run_with_cache(CLEAN)
    grid = torch.zeros(model.cfg.n_layers, 5)

    def restore(pos: int, value: Any, hook: Any) -> Any:
        value[:, pos] = clean[hook.name][:, pos]
        return value

    for layer in range(model.cfg.n_layers):
        for pos in range(5):
            name = lib.utils.get_act_name("resid_post", layer)
            hooks = [("hook_embed", lambda value, hook: value + noise), (name, partial(restore, pos))]
            grid[layer, pos] = model.run_with_hooks(CLEAN, fwd_hooks=hooks)[0, -1].softmax(-1)[3].detach()
    return {"grid": grid}


@scenario("attn_only", "attn_only_bare", "grouped")
def full_circuits(lib: Library, model: Any) -> Outcome:
    """Copying and previous-token scores read off products of weights."""
    full_ov = lib.FactoredMatrix(model.W_E @ model.W_V[0, 1], model.W_O[0, 1] @ model.W_U)
    eigenvalues = full_ov.eigenvalues
    embedded = model.W_E[:5]
    scores = embedded @ model.W_Q[1, 0] @ model.W_K[1, 0].transpose(-1, -2) @ embedded.T / model.cfg.d_head**0.5
    return {
        "copying": (eigenvalues.sum() / eigenvalues.abs().sum()).real,
        "OV of tokens": full_ov.AB[:4, :4],
        "QK of tokens": scores.softmax(-1),
        "OV": (model.OV[0, 1] @ model.OV[1, 0]).AB,
        "norms": model.OV.norm(),
    }


@scenario("plain", "attn_only", "rotary")
def head_ablation(lib: Library, model: Any) -> Outcome:
    """Loss by head when its result is zero, its pattern is the mean, and its output is from another prompt."""
    _, other = model.run_with_cache(CORRUPTED)
    out: Outcome = {}

    def zero(head: int, z: Any, hook: Any) -> None:
        z[:, :, head, :] = 0.0

    def even(head: int, pattern: Any, hook: Any) -> Any:
        weights = torch.ones_like(pattern[:, head]).tril()
        pattern[:, head] = weights / weights.sum(-1, keepdim=True)
        return pattern

    def resample(head: int, z: Any, hook: Any) -> Any:
        z[:, :, head] = other[hook.name][:, :, head]
        return z

    for layer, head in _heads(model):
        for name, site, edit in (("zero", "z", zero), ("even", "pattern", even), ("resampled", "z", resample)):
            hooks = [(lib.utils.get_act_name(site, layer), partial(edit, head))]
            out[f"{name} {layer}.{head}"] = model.run_with_hooks(CLEAN, return_type="loss", fwd_hooks=hooks)
    return out


@scenario("plain", "gated", "llama")
def neurons(lib: Library, model: Any) -> Outcome:
    """What the strongest neurons promote, and the loss without each of them."""
    _, cache = model.run_with_cache(tokens(2, 5))
    strongest = cache["post", 1].abs().amax((0, 1)).topk(3).indices
    out: Outcome = {"strongest": strongest, "promoted": model.W_out[1, strongest] @ model.W_U}

    def without(neuron: int, value: Any, hook: Any) -> None:
        value[..., neuron] = 0.0

    for neuron in strongest.tolist():
        hooks = [("blocks.1.mlp.hook_post", partial(without, neuron))]
        out[f"without {neuron}"] = model.run_with_hooks(tokens(2, 5), return_type="loss", fwd_hooks=hooks)
    return out


@scenario("text_plain", "text_llama")
def prompts_of_names(lib: Library, model: Any) -> Outcome:
    """Logit differences of a small set of prompts, by text."""
    texts = [
        "When John and Mary went to the store, John gave a drink to",
        "When John and Mary went to the store, Mary gave a drink to",
    ]
    answers = torch.tensor(
        [[model.to_single_token(name) for name in pair] for pair in ((" Mary", " John"), (" John", " Mary"))]
    )
    logits, cache = model.run_with_cache(texts)
    last = logits[:, -1].gather(-1, answers)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
    return {
        "differences": last[:, 0] - last[:, 1],
        "tokens": model.to_tokens(texts),
        "pieces": model.to_str_tokens(texts[0]),
        "labels": heads[1],
        "heads": heads[0],
        "pattern": cache["pattern", 1],
    }
