"""What course notebooks do: induction heads, logit attribution, patching by hand, trained toy models, probes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix, utils
from transformer_lens.hook_points import HookPoint
from transformer_lens.utils import get_act_name

from tests.downstream.models import (
    ATTENTION_ONLY,
    BRACKET_CLASSIFIER,
    GEMMA_LIKE,
    GPT2_LIKE,
    build,
    logit_difference,
    tokens,
)


def induction() -> dict[str, Tensor]:
    """Score heads by hooks on patterns, ablate each, and take an attention-only model apart."""
    model = build(ATTENTION_ONLY)
    half = tokens(2, 5, seed=11)
    repeated = torch.cat([half, half], dim=1)
    stripe = torch.zeros(2, 4, dtype=torch.float64)

    def score(pattern: Tensor, hook: HookPoint) -> None:
        stripe[hook.layer()] = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 5).mean((0, -1))

    def ablate(z: Tensor, hook: HookPoint, head: int) -> Tensor:
        z[:, :, head] = 0.0
        return z

    model.run_with_hooks(repeated, return_type=None, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), score)])
    losses = torch.zeros(2, 4, dtype=torch.float64)
    for layer in range(2):
        for head in range(4):
            hooks = [(get_act_name("z", layer), partial(ablate, head=head))]
            losses[layer, head] = model.run_with_hooks(repeated, return_type="loss", fwd_hooks=hooks)
            model.reset_hooks()
    circuit = model.W_E @ FactoredMatrix(model.W_V[1, 2], model.W_O[1, 2]) @ model.W_U
    _, cache = model.run_with_cache(repeated[0], remove_batch_dim=True)
    scores = torch.einsum("qhd,khd->hqk", cache["q", 1], cache["k", 1]) / model.cfg.attn_scale
    return {
        "stripe": stripe,
        "losses": losses,
        "per_token": model(repeated, return_type="loss", loss_per_token=True),
        "composition": model.all_composition_scores("K"),
        "eigenvalues": circuit.eigenvalues.real.sum(-1),
        "circuit": utils.get_corner(circuit.AB, 3),
        "attn_scores": scores,
    }


def logit_attribution() -> dict[str, Tensor]:
    """Take the residual stream of a model with folded norms apart, and read each part along a direction of logits."""
    model = build({**GPT2_LIKE, "normalization_type": "LNPre"})
    prompts, answers = tokens(3, 7, seed=12), tokens(3, 2, seed=13)
    logits, cache = model.run_with_cache(prompts)
    right, wrong = model.tokens_to_residual_directions(answers).unbind(1)
    direction = right - wrong

    def along(stack: Tensor, cache: ActivationCache) -> Tensor:
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
        return torch.einsum("cbd,bd->c", scaled, direction) / len(prompts)

    accumulated, labels = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
    parts = cache.decompose_resid(layer=-1, pos_slice=-1)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    assert len(labels) == len(accumulated)
    return {
        "logits": logits,
        "accumulated": along(accumulated, cache),
        "parts": along(parts, cache),
        "heads": along(heads, cache),
        "lens": cache.apply_ln_to_stack(accumulated, layer=-1, pos_slice=-1) @ model.W_U + model.b_U,
        "neurons": cache.get_neuron_results(1, neuron_slice=(2, 5), pos_slice=-1),
        "attrs": cache.logit_attrs(heads, answers[:, 0], incorrect_tokens=answers[:, 1], pos_slice=-1),
    }


def patching_by_hand() -> dict[str, Tensor]:
    """Patch activations and the paths between heads with hooks, in a model with query groups."""
    model = build(GEMMA_LIKE)
    clean, corrupted = tokens(2, 8, seed=14), tokens(2, 8, seed=15)
    _, clean_cache = model.run_with_cache(clean)
    _, corrupted_cache = model.run_with_cache(corrupted)

    def at_position(resid: Tensor, hook: HookPoint, pos: int, cache: ActivationCache) -> Tensor:
        resid[:, pos, :] = cache[hook.name][:, pos, :]
        return resid

    def one_head(z: Tensor, hook: HookPoint, head: int, cache: ActivationCache) -> Tensor:
        z[:, :, head] = cache[hook.name][:, :, head]
        return z

    def all_but(z: Tensor, hook: HookPoint, head: int, layer: int) -> Tensor:
        z[...] = corrupted_cache[hook.name]
        if hook.layer() == layer:
            z[:, :, head] = clean_cache[hook.name][:, :, head]
        return z

    def whole(activation: Tensor, hook: HookPoint, value: Tensor) -> Tensor:
        return value

    grid, heads, paths = (torch.zeros(2, size, dtype=torch.float64) for size in (8, 4, 4))
    with torch.no_grad():
        for layer in range(2):
            for pos in range(8):
                hook = partial(at_position, pos=pos, cache=clean_cache)
                patched = model.run_with_hooks(corrupted, fwd_hooks=[(get_act_name("resid_pre", layer), hook)])
                grid[layer, pos] = logit_difference(patched)
            for head in range(4):
                hook = partial(one_head, head=head, cache=clean_cache)
                patched = model.run_with_hooks(corrupted, fwd_hooks=[(get_act_name("z", layer), hook)])
                heads[layer, head] = logit_difference(patched)
                # The path from one head to the last residual: all heads held, that one from the clean run.
                model.add_hook(lambda name: name.endswith("hook_z"), partial(all_but, head=head, layer=layer))
                _, held = model.run_with_cache(corrupted, names_filter=lambda name: name.endswith("1.hook_resid_post"))
                model.reset_hooks()
                final = partial(whole, value=held["resid_post", 1])
                patched = model.run_with_hooks(corrupted, fwd_hooks=[(get_act_name("resid_post", 1), final)])
                paths[layer, head] = logit_difference(patched)
    return {"grid": grid, "heads": heads, "paths": paths, "pattern": clean_cache["pattern", 0]}


def bracket_classifier() -> dict[str, Tensor]:
    """Load a trained bidirectional classifier with its buffers, process its weights, and mask padding with hooks."""
    trained = build(BRACKET_CLASSIFIER)
    state = {name: value.detach().clone() for name, value in trained.state_dict().items()}
    for layer in range(2):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(12, 12).bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    model = build(BRACKET_CLASSIFIER)
    state = model.center_writing_weights(state)
    state = model.fold_layer_norm(state)
    model.load_state_dict(state, strict=False)

    def keep_padding(padded: Tensor, hook: HookPoint) -> None:
        hook.ctx["padding"] = padded == 0

    def mask_padding(scores: Tensor, hook: HookPoint) -> Tensor:
        keys = model.hook_dict["hook_tokens"].ctx["padding"][:, None, None, :]
        scores.masked_fill_(keys, -1e5)
        return scores

    model.hook_dict["hook_tokens"].add_hook(keep_padding, is_permanent=True)
    for block in model.blocks:
        block.attn.hook_attn_scores.add_hook(mask_padding, is_permanent=True)
    model.reset_hooks(including_permanent=False)
    prompts = tokens(3, 9, seed=16, vocab=5)
    prompts[0, 6:] = 0
    prompts[2, 3:] = 0
    with torch.no_grad():
        logits, cache = model.run_with_cache(prompts)
        alone = model(prompts[:1, :6])
    return {
        "logits": logits[:, 0],
        "alone": alone[:, 0],
        "pattern": cache["pattern", 1][0],
        "result": cache["result", 0][:, 0],
        "W_in": model.W_in[0],
        "b_in": model.b_in[1],
    }


def probe() -> dict[str, Tensor]:
    """Train a linear probe on a cached residual stream, and steer with what it found."""
    model = build(GPT2_LIKE)
    prompts = tokens(8, 6, seed=17)
    labels = (prompts[:, 2] > 14).double()
    _, cache = model.run_with_cache(prompts, return_type=None, names_filter=lambda name: name.endswith("resid_post"))
    direction = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([direction], lr=0.1)
    losses = []
    for _ in range(5):
        predicted = cache["resid_post", 1][:, 2] @ direction
        loss = torch.nn.functional.binary_cross_entropy_with_logits(predicted, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())

    def steer(resid: Tensor, hook: HookPoint) -> Tensor:
        return resid + 3.0 * direction.detach()

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", steer)]):
        steered = model(prompts)[:, -1]
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "direction": direction.detach(),
        "numpy": torch.from_numpy(cache["resid_post", 0].numpy()[:2]),
        "steered": steered.detach(),
    }
