"""Every hook site of several architectures: its name, its shape, what an edit there does, and its gradient.

The oracle is `reference_logits`: the equations written out once more, slowly, with a tap at every site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from tests.helpers import tiny_tokens
from tests.hook_sites_helpers import (
    ARCHITECTURES,
    BATCH,
    POS,
    TOKENS,
    carried_beside,
    direction_for,
    is_mixture,
    model_of,
    sites_of,
    turns,
)

Edit = Callable[[str, Tensor], Tensor]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def float_sites(model: HookedTransformer) -> list[str]:
    return [site for site in sites_of(model) if not site.endswith(("hook_tokens", "hook_expert_indices"))]


# The equations


def reference_logits(model: HookedTransformer, tokens: Tensor, edit: Edit = lambda name, x: x) -> Tensor:
    """Return the logits [batch pos vocab], with `edit(name, activation)` in the place of every activation."""
    cfg = model.cfg
    W = dict(model.named_parameters())
    n_pos = tokens.shape[1]
    query, key = torch.arange(n_pos)[:, None], torch.arange(n_pos)[None, :]

    def norm(
        x: Tensor,
        module: str,
        tapped: bool = True,
        kind: str | None = cfg.normalization_type,
        over: tuple[int, ...] = (-1,),
        eps: float = cfg.eps,
    ) -> Tensor:
        if kind is None:
            return x
        if kind.startswith("LN"):
            x = x - x.mean(over, keepdim=True)
        scale = (x.pow(2).mean(over, keepdim=True) + eps).sqrt()
        scale = edit(f"{module}.hook_scale", scale) if tapped else scale
        x = x / scale
        x = edit(f"{module}.hook_normalized", x) if tapped else x
        return x * W.get(f"{module}.w", torch.ones(())) + W.get(f"{module}.b", torch.zeros(()))

    def read(stream: Tensor, module: str, tapped: bool = True) -> Tensor:
        absent = module == "blocks.0.ln1" and not cfg.first_norm
        return norm(stream, module, tapped) if cfg.norm_placement.startswith("before") and not absent else stream

    def written(out: Tensor, module: str) -> Tensor:
        return norm(out, module) if cfg.norm_placement.endswith("after") else out

    def joined(stream: Tensor, module: str) -> Tensor:
        return norm(stream, module) if cfg.norm_placement == "residual" else stream

    def qk_norm(x: Tensor, module: str) -> Tensor:
        if not cfg.use_qk_norm:
            return x
        return norm(x, module, kind=cfg.qk_norm_type, over=(-2, -1) if cfg.qk_norm_across_heads else (-1,))

    def rotated(x: Tensor) -> Tensor:
        dim = cfg.rotary_dim or 0
        # Angles in single precision, as checkpoints are trained with.
        frequency = 1.0 / cfg.rotary_base ** (torch.arange(0, dim, 2).float() / dim)
        amplitude = (cfg.yarn_attention_factor or 1.0) if cfg.use_yarn_rope else 1.0  # its factor of 1 slows no pair
        angle = (torch.arange(n_pos).float()[:, None] * frequency)[:, None]
        turn = torch.complex((amplitude * angle.cos()).double(), (amplitude * angle.sin()).double())
        first = slice(0, dim, 2) if cfg.rotary_adjacent_pairs else slice(0, dim // 2)
        second = slice(1, dim, 2) if cfg.rotary_adjacent_pairs else slice(dim // 2, dim)
        turned = torch.complex(x[..., first], x[..., second]) * turn
        out = x.clone()
        out[..., first], out[..., second] = turned.real, turned.imag
        return out

    def latent(x: Tensor, layer: int, name: str, tapped: bool) -> Tensor:
        at = f"blocks.{layer}.attn."
        x = x @ W[f"{at}W_D{name.upper()}"] + W[f"{at}b_D{name.upper()}"]
        x = norm(x, f"{at}latent_{name}_norm", tapped, "RMS", eps=cfg.latent_eps)
        return edit(f"{at}hook_latent_{name}", x) if tapped else x

    def projected(x: Tensor, latents: Tensor | None, layer: int, letter: str) -> Tensor:
        """Queries, keys or values of each head, from its own input and the latents of it."""
        at, heads = f"blocks.{layer}.attn.", x.shape[2]
        if latents is None:
            W_in, b_in = W[f"{at}W_{letter.upper()}"], W[f"{at}b_{letter.upper()}"]
            return torch.stack([x[:, :, i] @ W_in[i] + b_in[i] for i in range(heads)], 2)
        up = torch.stack([latents[:, :, i] @ W[f"{at}W_U{letter.upper()}"][i] for i in range(heads)], 2)
        return torch.cat((x @ W[at + "W_KR"] + W[at + "b_KR"], up), -1) if letter == "k" else up

    def attention(layer: int, stream: Tensor, positions: Tensor) -> Tensor:
        at = f"blocks.{layer}."
        group = cfg.n_heads // cfg.n_kv_heads
        shared = read(stream, at + "ln1")

        def per_head(x: Tensor, heads: int) -> Tensor:
            return x[:, :, None].expand(-1, -1, heads, -1)

        copies = edit(at + "hook_attn_in", per_head(stream, cfg.n_heads))
        grouped = copies.unflatten(2, (cfg.n_kv_heads, group)).mean(3)
        inputs = {}
        compressed = [*(["kv"] if cfg.d_latent_kv else []), *(["q"] if cfg.d_latent_q else [])]
        tapped = {name: latent(shared, layer, name, True) for name in compressed}
        for letter, copy in (("q", copies), ("k", grouped), ("v", grouped)):
            source = edit(f"{at}hook_{letter}_input", copy)
            untouched = torch.allclose(source, per_head(stream, source.shape[2]), rtol=0, atol=1e-14)
            x = per_head(shared, source.shape[2]) if untouched else read(source, at + "ln1", tapped=False)
            x = x if letter == "v" else x + positions
            name = next((name for name in compressed if letter in name), "")
            latents = per_head(tapped[name], cfg.n_heads) if name and untouched else None
            latents = latent(x, layer, name, False) if name and not untouched else latents
            if letter == "q" and cfg.attention_gate:
                opened = torch.stack([x[:, :, i] @ W[f"{at}attn.W_G"][i] for i in range(cfg.n_heads)], 2)
                inputs["gate"] = edit(f"{at}attn.hook_gate", 1 / (1 + (-(opened + W[f"{at}attn.b_G"])).exp()))
            made = projected(x, latents, layer, letter)
            if letter != "v" and not cfg.qk_norm_after_rotary:
                made = qk_norm(made, f"{at}attn.{letter}_norm")
            if cfg.clip_qkv is not None:
                made = made.where(made < cfg.clip_qkv, cfg.clip_qkv).where(made > -cfg.clip_qkv, -cfg.clip_qkv)
            made = edit(f"{at}attn.hook_{letter}", made)
            if letter != "v":
                made = rotated(made) if turns(model, layer) else made
                made = qk_norm(made, f"{at}attn.{letter}_norm") if cfg.qk_norm_after_rotary else made
                if letter == "q":
                    contexts = torch.arange(made.shape[1]) // cfg.query_scale_ctx_len
                    made = made * (1 + cfg.query_scale_beta * contexts.float().log1p()).to(made)[:, None, None]
                made = edit(f"{at}attn.hook_rot_{letter}", made) if turns(model, layer) else made
            inputs[letter] = made
        keys, values = (inputs[letter].repeat_interleave(group, 2) for letter in "kv")
        scores = torch.einsum("bqhd,bkhd->bhqk", inputs["q"], keys) / math.sqrt(cfg.d_head)
        if cfg.scale_attn_by_inverse_layer_idx:
            scores = scores / (layer + 1)
        if cfg.attn_scores_soft_cap > 0:
            scores = cfg.attn_scores_soft_cap * torch.tanh(scores / cfg.attn_scores_soft_cap)
        if cfg.positional_embedding_type == "alibi":
            slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]).double()  # of three heads, exact in bfloat16
            bias = slopes[:, None, None] * (key if cfg.alibi_in_bfloat16 else -(query - key).abs())
            scores = scores + cfg.alibi_scale * bias
        allowed = query >= key if cfg.attention_dir == "causal" else torch.ones(n_pos, n_pos, dtype=torch.bool)
        if cfg.attn_types is not None and cfg.attn_types[layer] == "local":
            allowed = allowed & (query - key < (cfg.window_size or 0))
        scores = edit(at + "attn.hook_attn_scores", scores.masked_fill(~allowed, -math.inf))
        likelihood = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        total = likelihood.sum(-1, keepdim=True)
        if cfg.attention_sinks:
            sinks = W[at + "attn.sinks"][:, None, None]
            total = total + (sinks - scores.detach().amax(-1, keepdim=True)).exp()
        pattern = edit(at + "attn.hook_pattern", likelihood / total)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
        z = edit(at + "attn.hook_z", mixed * inputs["gate"] if cfg.attention_gate else mixed)
        result = torch.einsum("bphe,hed->bphd", z, W[at + "attn.W_O"])
        return edit(at + "attn.hook_result", result).sum(2) + W[at + "attn.b_O"]

    def mlp(layer: int, stream: Tensor) -> Tensor:
        at = f"blocks.{layer}."
        x = read(edit(at + "hook_mlp_in", stream), at + "ln2")

        def xielu(y: Tensor) -> Tensor:
            alpha_p, alpha_n = (W[f"{at}mlp.act_fn.alpha_{sign}"].exp().log1p() for sign in "pn")
            return torch.where(y > 0, alpha_p * y**2, (0.5 + alpha_n) * (y.exp() - 1 - y)) + 0.5 * y

        act: Callable[[Tensor], Tensor] = {
            "gelu_new": lambda y: F.gelu(y, approximate="tanh"),
            "silu": F.silu,
            "quick_gelu": lambda y: y / (1 + (-1.702 * y).exp()),
            "xielu": xielu,
            "solu_ln": lambda y: y * y.softmax(-1),
        }[cfg.act_fn or ""]

        def hidden(x: Tensor, weights: Callable[[str], Tensor], tap: Edit, limit: float | None = None) -> Tensor:
            if cfg.gated_mlp:
                gate = tap("hook_pre", x @ weights("W_gate") + weights("b_gate"))
                linear = tap("hook_pre_linear", x @ weights("W_in") + weights("b_in"))
                if limit is not None:
                    gate = gate.where(gate < limit, limit)
                    linear = 1 + linear.where(linear < limit, limit).where(linear > -limit, -limit)
                post = act(gate) * linear
            else:
                post = act(tap("hook_pre", x @ weights("W_in") + weights("b_in")))
            if cfg.act_fn == "solu_ln":
                post = norm(tap("hook_mid", post), at + "mlp.ln")
            return tap("hook_post", post) @ weights("W_out") + weights("b_out")

        if not is_mixture(model, layer):
            out = hidden(x, lambda weight: W[f"{at}mlp.{weight}"], lambda site, y: edit(f"{at}mlp.{site}", y))
            if cfg.shortcut_experts and layer % 2 == 0:
                carried.append(edit(at + "hook_shortcut_out", experts(x, at + "shortcut.", hidden)))
            elif cfg.shortcut_experts:
                out = out + carried.pop()
            return out
        at += "mlp."
        out = experts(x, at, hidden)
        if cfg.d_shared_expert is not None:
            shared = hidden(x, lambda name: W[f"{at}shared.{name}"], lambda site, y: edit(f"{at}shared.{site}", y))
            if cfg.shared_expert_gate:
                shared = shared / (1 + (-(x @ W[at + "W_shared_gate"] + W[at + "b_shared_gate"])).exp())
            out = out + shared
        return out

    carried: list[Tensor] = []

    def experts(x: Tensor, at: str, hidden: Callable[..., Tensor]) -> Tensor:
        """What the experts write that a router chooses; the last of them, if without weights, write what they read."""
        scores = x @ W[at + "W_router"] + W[at + "b_router"]
        chance = scores.softmax(-1) if cfg.sparsemixer_jitter is None else sparsemixer(scores)
        chance = 1 / (1 + (-scores).exp()) if cfg.router_scores == "sigmoid" else chance
        chance = edit(at + "hook_expert_weights", chance)
        eligible = corrected(chance, W[at + "b_correction"]) if cfg.router_correction else chance
        chosen = edit(at + "hook_expert_indices", eligible.topk(cfg.experts_per_token or 0).indices)
        weight = chance.gather(-1, chosen)
        if cfg.norm_topk_prob and cfg.sparsemixer_jitter is None:
            weight = weight / weight.sum(-1, keepdim=True)
        weight = weight * cfg.routed_scale
        written = [
            hidden(x, lambda name, e=e: W[at + name][e], lambda site, y: y, cfg.gated_limit)
            for e in range((cfg.num_experts or 0) - cfg.identity_experts)
        ]
        every = torch.stack([*written, *[x] * cfg.identity_experts], 2)
        return (every.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1])) * weight[..., None]).sum(2)

    def corrected(chance: Tensor, correction: Tensor) -> Tensor:
        """Corrected weights; far below the others in groups whose two best sum to less than those of enough others."""
        grouped = (chance + correction).unflatten(-1, (cfg.expert_groups or 1, -1))
        ordered = grouped.sort(-1).values
        worth = ordered[..., -1] + ordered[..., -2]
        rank = (worth[..., None, :] > worth[..., None]).sum(-1)
        return (grouped - 1000 * (rank >= (cfg.expert_groups_per_token or 1))[..., None]).flatten(-2)

    def sparsemixer(scores: Tensor) -> Tensor:
        """The best expert's share among those near it, then the second's among those near that one."""
        weights, left = torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)
        for _ in range(2):
            best = scores.masked_fill(~left, -math.inf).amax(-1, keepdim=True)
            winner = left & (scores == best)
            near = left & ((best - scores) / scores.abs().maximum(best) <= 2 * (cfg.sparsemixer_jitter or 0))
            share = scores.exp() / (scores.exp() * near).sum(-1, keepdim=True)
            weights, left = torch.where(winner, share, weights), left & ~winner
        return weights

    tokens = edit("hook_tokens", tokens)
    stream = W["embed.W_E"][tokens] * cfg.embedding_scale
    if cfg.post_embedding_ln:
        stream = norm(stream, "embed.ln")
    stream = edit("hook_embed", stream)
    read_positions = torch.zeros(())
    if "pos_embed.W_pos" in W:
        positions = edit("hook_pos_embed", W["pos_embed.W_pos"][:n_pos].expand(tokens.shape[0], -1, -1))
        if cfg.positional_embedding_type == "shortformer":
            read_positions = positions[:, :, None]
        else:
            stream = stream + positions
    for layer in range(cfg.n_layers):
        at = f"blocks.{layer}."
        pre = edit(at + "hook_resid_pre", stream)
        attn_out = edit(at + "hook_attn_out", written(attention(layer, pre, read_positions), at + "ln1_post"))
        stream = joined(pre + attn_out, at + "ln1")
        if not cfg.attn_only:
            if not cfg.parallel_attn_mlp:
                stream = edit(at + "hook_resid_mid", stream)
            mlp_out = written(mlp(layer, pre if cfg.parallel_attn_mlp else stream), at + "ln2_post")
            stream = joined(stream + edit(at + "hook_mlp_out", mlp_out), at + "ln2")
        stream = edit(at + "hook_resid_post", stream)
    stream = norm(stream, "ln_final") if cfg.final_norm else stream
    if cfg.unembed_act_fn is not None:
        at = "unembed.transform."
        hidden = edit(at + "hook_pre", stream @ W[at + "W_dense"] + W[at + "b_dense"])
        stream = norm(edit(at + "hook_post", hidden / (1 + (-hidden).exp())), at + "ln")
    stream = edit("unembed.hook_in", stream)
    W_U = W["embed.W_E"].T if cfg.tie_word_embeddings else W["unembed.W_U"]
    logits = (stream @ W_U + W["unembed.b_U"]) * cfg.logit_scale
    if cfg.output_logits_soft_cap > 0:
        logits = cfg.output_logits_soft_cap * torch.tanh(logits / cfg.output_logits_soft_cap)
    return edit("unembed.hook_out", logits)


# Names, shapes, values


@every_architecture
def test_the_sites_have_the_names_and_shapes_of_the_table(name: str) -> None:
    model = model_of(name)
    expected = sites_of(model)
    assert set(model.hook_dict) == set(expected)
    _, cache = model.run_with_cache(TOKENS, names_filter=list(expected))
    assert {site: tuple(tensor.shape) for site, tensor in cache.items()} == expected


@every_architecture
def test_every_activation_is_what_the_equations_say(name: str) -> None:
    model = model_of(name)
    expected: dict[str, Tensor] = {}

    def keep(site: str, x: Tensor) -> Tensor:
        expected[site] = x
        return x

    with torch.no_grad():
        logits = reference_logits(model, TOKENS, keep)
        ours, cache = model.run_with_cache(TOKENS, names_filter="*")
        assert set(cache) == set(expected)
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=1e-10)
        for site, tensor in cache.items():
            torch.testing.assert_close(
                tensor, expected[site], rtol=0, atol=1e-10, msg=lambda m, site=site: f"{site}: {m}"
            )


@pytest.mark.usefixtures("no_type_checks")
@every_architecture
def test_an_edit_at_any_site_does_what_the_equations_say_returned_or_in_place(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        clean = model(TOKENS)
        for site in float_sites(model):
            delta = 0.3 * direction_for(sites_of(model)[site])

            def edit(at: str, x: Tensor, site: str = site, delta: Tensor = delta) -> Tensor:
                return x + delta if at == site else x

            def in_place(x: Tensor, hook: HookPoint, delta: Tensor = delta) -> None:
                x += delta

            expected = reference_logits(model, TOKENS, edit)
            returned = model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda x, hook, delta=delta: x + delta)])
            edited = model.run_with_hooks(TOKENS, fwd_hooks=[(site, in_place)])
            assert (returned - clean).abs().max() > 1e-6, f"an edit at {site} changes nothing"
            assert torch.equal(returned, edited), f"{site}: in place is not as returned"
            torch.testing.assert_close(returned, expected, rtol=0, atol=1e-10, msg=lambda m, site=site: f"{site}: {m}")
            with torch.enable_grad():
                with_graph = model.run_with_hooks(TOKENS, fwd_hooks=[(site, in_place)])
            torch.testing.assert_close(with_graph, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "mixture", "sparsemixer"])
def test_an_edit_of_integers_does_what_the_equations_say(name: str) -> None:
    model = model_of(name)
    bounds = {"hook_tokens": model.cfg.d_vocab, "blocks.0.mlp.hook_expert_indices": model.cfg.num_experts}
    with torch.no_grad():
        for site, bound in bounds.items():
            if site not in model.hook_dict:
                continue

            def in_place(x: Tensor, hook: HookPoint, bound: int | None = bound) -> None:
                x.add_(1).remainder_(bound)

            expected = reference_logits(
                model, TOKENS, lambda at, x, site=site, bound=bound: (x + 1) % bound if at == site else x
            )
            returned = model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda x, hook, bound=bound: (x + 1) % bound)])
            edited = model.run_with_hooks(TOKENS, fwd_hooks=[(site, in_place)])
            assert (returned - model(TOKENS)).abs().max() > 1e-6
            assert torch.equal(returned, edited)
            torch.testing.assert_close(returned, expected, rtol=0, atol=1e-10)


# Gradients


@pytest.mark.usefixtures("no_type_checks")
@every_architecture
def test_the_gradient_at_any_site_is_the_finite_difference(name: str) -> None:
    model = model_of(name)
    readout = direction_for((BATCH, POS, model.cfg.d_vocab), seed=2)
    step = 1e-6
    for site in float_sites(model):
        delta = direction_for(sites_of(model)[site])

        def shifted(by: float, site: str = site, delta: Tensor = delta) -> float:
            with torch.no_grad():
                logits = model.run_with_hooks(TOKENS, fwd_hooks=[(site, lambda x, hook: x + by * delta)])
            return float((logits * readout).sum())

        numerical = (shifted(step) - shifted(-step)) / (2 * step)
        assert abs(numerical) > 1e-6, f"{site} does not matter"

        by_hook: list[Tensor] = []
        with model.hooks(bwd_hooks=[(site, lambda grad, hook, kept=by_hook: kept.append(grad))]):
            logits, cache = model.run_with_cache(TOKENS, names_filter=site, keep_graph=True)
        (by_autograd,) = torch.autograd.grad((logits * readout).sum(), cache[site])
        for gradient in (by_autograd, *by_hook):
            analytical = float((gradient * delta).sum())
            assert analytical == pytest.approx(numerical, rel=1e-6, abs=1e-6), site
        assert len(by_hook) == 1, site


@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary"])
def test_a_replaced_gradient_flows_on_from_any_site(name: str) -> None:
    model = model_of(name)
    for site in float_sites(model):
        if site.startswith(("unembed", "ln_final")) or ".1." in site:
            continue
        logits, cache = model.run_with_cache(TOKENS, names_filter=site, keep_graph=True)
        reached = [model.W_E, cache[site]]
        _, at_site = torch.autograd.grad((logits**2).sum(), reached, retain_graph=True)
        (through,) = torch.autograd.grad(cache[site], model.W_E, at_site, allow_unused=True)
        clean = torch.autograd.grad((model(TOKENS) ** 2).sum(), model.W_E)[0]
        with model.hooks(bwd_hooks=[(site, lambda grad, hook: torch.zeros_like(grad))]):
            cut = torch.autograd.grad((model(TOKENS) ** 2).sum(), model.W_E)[0]
        expected = clean if through is None else clean - through
        torch.testing.assert_close(cut, expected, rtol=0, atol=1e-9, msg=lambda m, site=site: f"{site}: {m}")


@pytest.mark.parametrize("name", ["gpt2", "grouped gated rms rotary", "solu_ln"])
@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
def test_an_edit_in_place_gives_the_gradients_of_the_same_edit_returned(name: str, direction: str) -> None:
    model = model_of(name)

    def gradients(site: str, hook: Callable[..., Any]) -> tuple[Tensor, ...]:
        with model.hooks(**{direction: [(site, hook)]}):
            return torch.autograd.grad((model(TOKENS) ** 2).sum(), (model.W_E, model.blocks[0].attn.W_V))

    for site in float_sites(model):
        if not site.startswith(("hook", "blocks.0")):
            continue
        returned = gradients(site, lambda x, hook: 3 * x)
        in_place = gradients(site, lambda x, hook: x.mul_(3))
        for expected, got in zip(returned, in_place, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=site)


# Patching


@every_architecture
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_patching_all_of_a_residual_site_restores_the_clean_logits(name: str, site: str) -> None:
    model = model_of(name)
    if f"blocks.0.hook_{site}" not in model.hook_dict:
        assert site == "resid_mid"
        assert model.cfg.attn_only or model.cfg.parallel_attn_mlp
        return
    corrupted = tiny_tokens(BATCH, POS, seed=7)
    for layer in range(model.cfg.n_layers):
        where = f"blocks.{layer}.hook_{site}"
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                sites = [where, *carried_beside(model, layer, site)]
                clean, cache = model.run_with_cache(TOKENS, names_filter=sites)
                patched = model.run_with_hooks(corrupted, fwd_hooks=[(sites, lambda x, hook, c=cache: c[hook.name])])
                assert not torch.allclose(model(corrupted), clean)
                assert torch.equal(patched, clean)
                in_place = model.run_with_hooks(
                    corrupted, fwd_hooks=[(sites, lambda x, hook, c=cache: x.copy_(c[hook.name]))]
                )
                assert torch.equal(in_place, clean)


# Recording


def needs_another_path(site: str) -> bool:
    """Whether the fused operation has no such intermediate: attention's scores and pattern, a norm's halves."""
    return site.endswith(("hook_attn_scores", "hook_pattern", "hook_scale", "hook_normalized"))


@every_architecture
def test_a_site_that_is_only_recorded_changes_no_output(name: str) -> None:
    model = model_of(name)
    for grad in (False, True) if name in ("gpt2", "grouped gated rms rotary") else (False,):
        with torch.set_grad_enabled(grad):
            clean = model(TOKENS)
            for site, tensor in sites_of(model).items():
                for keep_graph in (False, True) if grad else (False,):
                    recorded, cache = model.run_with_cache(TOKENS, names_filter=site, keep_graph=keep_graph)
                    assert tuple(cache[site].shape) == tensor
                    on_demand = model.hook_dict[site].on_demand
                    if needs_another_path(site) or (keep_graph and on_demand):
                        torch.testing.assert_close(recorded, clean, rtol=0, atol=1e-12, msg=site)
                    else:
                        assert torch.equal(recorded, clean), site


def test_recording_scores_where_a_soft_cap_needs_them_anyway_changes_not_a_bit() -> None:
    model = model_of("soft caps")
    with torch.no_grad():
        clean = model(TOKENS)
        for site in ("blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"):
            assert torch.equal(model.run_with_cache(TOKENS, names_filter=site)[0], clean)
