"""Hooks as notebooks write them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers, tokens
from tests.classic.scenario import Outcome, scenario

FEW = ("plain", "grouped", "parallel", "rotary")


def _zero(value: Any, hook: Any) -> Any:
    value[:] = 0.0


def _half(value: Any, hook: Any) -> Any:
    return value / 2


def _last_from(other: Any, value: Any, hook: Any) -> Any:
    value[:, -1] = other[:, -1]
    return value


@scenario("plain", "parallel", "attn_only", "grouped", "shortformer", "gated", "both_sides", "soft_caps")
def every_site_edited(lib: Library, model: Any) -> Outcome:
    """Each site of an unfiltered cache halved, by a hook that returns and by one that writes."""
    names = list(model.run_with_cache(tokens(1, 4))[1])

    def halve(value: Any, hook: Any) -> None:
        value *= 0.5

    out: Outcome = {}
    for name in names:
        out[name] = model.run_with_hooks(tokens(1, 4), fwd_hooks=[(name, _half)])[:, -1]
        written = model.run_with_hooks(tokens(1, 4), fwd_hooks=[(name, halve)])[:, -1]
        out[f"{name}, the same when written"] = bool(torch.allclose(written, out[name], atol=1e-6))
    return out


def _every_input(model: Any, flag: str, suffixes: tuple[str, ...]) -> Outcome:
    getattr(model, f"set_{flag}")(True)

    def head_zero(value: Any, hook: Any) -> Any:
        value[:, :, 0] *= 0.0
        return value

    names = [name for name in model.hook_dict if name.endswith(suffixes)]
    return {name: model.run_with_hooks(tokens(1, 4), fwd_hooks=[(name, head_zero)])[:, -1] for name in names}


@scenario("plain", "rotary", "rms", "ungrouped", "grouped", "shortformer", "parallel", "attn_only")
def per_head_inputs_edited(lib: Library, model: Any) -> Outcome:
    return _every_input(model, "use_split_qkv_input", ("hook_q_input", "hook_k_input", "hook_v_input"))


@scenario("plain", "rotary", "attn_only", "parallel")
def attention_inputs_edited(lib: Library, model: Any) -> Outcome:
    return _every_input(model, "use_attn_in", ("hook_attn_in",))


@scenario("plain", "grouped", "rotary")
def head_results_edited(lib: Library, model: Any) -> Outcome:
    return _every_input(model, "use_attn_result", ("hook_result",))


@scenario("plain", "rms")
def mlp_inputs_edited(lib: Library, model: Any) -> Outcome:
    model.set_use_hook_mlp_in(True)
    hooks = [("blocks.0.hook_mlp_in", _zero), ("blocks.1.hook_mlp_in", _half)]
    return {"logits": model.run_with_hooks(tokens(1, 4), fwd_hooks=hooks)}


@scenario(*FEW)
def in_place_and_returned(lib: Library, model: Any) -> Outcome:
    z = "blocks.0.attn.hook_z"
    out: Outcome = {
        "in place": model.run_with_hooks(tokens(2, 4), fwd_hooks=[(z, _zero)]),
        "returned": model.run_with_hooks(tokens(2, 4), fwd_hooks=[(z, _half)]),
        "both": model.run_with_hooks(tokens(2, 4), fwd_hooks=[(z, _half), (z, _half)]),
        "afterwards": model(tokens(2, 4)),
    }
    other = model.run_with_cache(tokens(2, 4, name="other"))[1]
    patch = partial(_last_from, other["resid_pre", 1])
    out["patched"] = model.run_with_hooks(tokens(2, 4), fwd_hooks=[("blocks.1.hook_resid_pre", patch)])
    by_rule = model.run_with_hooks(tokens(2, 4), fwd_hooks=[(lambda name: name.endswith("hook_z"), _half)])
    out["by rule"] = by_rule
    return out


@scenario("plain", "attn_only")
def batch_changing(lib: Library, model: Any) -> Outcome:
    def first(value: Any, hook: Any) -> Any:
        return value[:1]

    def twice(value: Any, hook: Any) -> Any:
        return torch.cat([value, value * 0.5])

    return {
        "fewer": model.run_with_hooks(tokens(3, 4), fwd_hooks=[("blocks.1.hook_resid_pre", first)]),
        "more": model.run_with_hooks(tokens(2, 4), fwd_hooks=[("blocks.0.hook_resid_post", twice)]),
        "more embeddings": model.run_with_hooks(
            tokens(1, 4), fwd_hooks=[("hook_embed", twice), ("hook_pos_embed", twice)]
        ),
    }


@scenario("plain")
def shared_tensors(lib: Library, model: Any) -> Outcome:
    """A tensor kept by one hook is the one that the next hook's gradient flows through."""
    kept: list[Any] = []

    def keep(value: Any, hook: Any) -> None:
        value.requires_grad_(True)
        value.retain_grad()
        kept.append(value)

    hooks = [("blocks.1.hook_resid_pre", keep), ("blocks.1.hook_resid_pre", lambda value, hook: value * 2)]
    model.run_with_hooks(tokens(1, 4), fwd_hooks=hooks)[0, -1, 2].backward()
    return {"gradient": kept[0].grad, "count": len(kept)}


@scenario("plain")
def frozen_parts(lib: Library, model: Any) -> Outcome:
    """Scales and patterns frozen as in attribution by linear paths, and the gradient at the embedding."""
    kept: list[Any] = []

    def detach(value: Any, hook: Any) -> Any:
        return value.detach()

    def keep(value: Any, hook: Any) -> Any:
        kept.append(value.detach().requires_grad_(True))
        return kept[-1]

    frozen = [(lambda name: name.endswith(("hook_scale", "hook_pattern")), detach), ("hook_embed", keep)]
    with model.hooks(fwd_hooks=frozen):
        model(tokens(1, 4))[0, -1, 2].backward()
    return {"gradient": kept[0].grad}


@scenario(*FEW)
def backward_hooks(lib: Library, model: Any) -> Outcome:
    seen: Outcome = {}

    def keep(gradient: Any, hook: Any) -> None:
        seen[hook.name] = gradient.detach().clone()

    def stop(gradient: Any, hook: Any) -> Any:
        return (torch.zeros_like(gradient),)

    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "hook_embed", "blocks.0.hook_mlp_out"]
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model(tokens(1, 4), return_type="loss").backward()
    model.zero_grad()
    with model.hooks(bwd_hooks=[("blocks.1.hook_attn_out", stop)]):
        model(tokens(1, 4), return_type="loss").backward()
    return {"seen": seen, "stopped": model.blocks[1].attn.W_O.grad, "not stopped": model.blocks[0].attn.W_O.grad}


@scenario("plain")
def kinds_of_hooks(lib: Library, model: Any) -> Outcome:
    order: list[str] = []

    def note(label: str, value: Any, hook: Any) -> None:
        order.append(label)

    name = "blocks.0.attn.hook_z"
    point = model.hook_dict[name]
    counts: dict[str, int] = {}
    model.add_hook(name, partial(note, "first"))
    model.add_hook(name, partial(note, "second"))
    model.add_hook(name, partial(note, "prepended"), prepend=True)
    model.add_perma_hook(name, partial(note, "permanent"))
    model(tokens(1, 2))
    counts["added"] = len(point.fwd_hooks)
    with model.hooks(fwd_hooks=[(name, partial(note, "inner"))]):
        counts["in a context"] = len(point.fwd_hooks)
        model(tokens(1, 2))
    counts["after it"] = len(point.fwd_hooks)
    model.reset_hooks()
    counts["reset"] = len(point.fwd_hooks)
    order.append("reset")
    model(tokens(1, 2))
    model.reset_hooks(including_permanent=True)
    counts["all reset"] = len(point.fwd_hooks)
    return {"order": order, "counts": counts}


@scenario("plain")
def contexts_in_contexts(lib: Library, model: Any) -> Outcome:
    z = "blocks.0.attn.hook_z"
    out: Outcome = {}
    with model.hooks(fwd_hooks=[(z, _half)]):
        with model.hooks(fwd_hooks=[(z, _half)]):
            out["two"] = model(tokens(1, 3))
        out["one"] = model(tokens(1, 3))
        out["with another run"] = model.run_with_hooks(tokens(1, 3), fwd_hooks=[("blocks.1.attn.hook_z", _zero)])
    out["none"] = model(tokens(1, 3))
    model.add_hook(z, _half)
    out["kept"] = model.run_with_hooks(tokens(1, 3), fwd_hooks=[("blocks.1.attn.hook_z", _zero)], reset_hooks_end=False)
    out["still there"] = model(tokens(1, 3))
    model.reset_hooks()
    return out


@scenario("plain")
def context_of_a_point(lib: Library, model: Any) -> Outcome:
    def remember(value: Any, hook: Any) -> None:
        hook.ctx["mean"] = value.mean().item()

    name = "blocks.1.hook_resid_mid"
    model.run_with_hooks(tokens(1, 3), fwd_hooks=[(name, remember)])
    point = model.hook_dict[name]
    out: Outcome = {"mean": point.ctx["mean"], "layer": point.layer(), "name": point.name}
    model.run_with_hooks(tokens(1, 3), fwd_hooks=[(name, remember)], clear_contexts=True)
    out["cleared"] = len(point.ctx)
    return out


@scenario("plain")
def has_hooks(lib: Library, model: Any) -> Outcome:
    point = model.blocks[0].hook_attn_out
    out: Outcome = {"none": point.has_hooks()}
    point.add_hook(_half)
    out["forward"], out["backward"] = point.has_hooks(dir="fwd"), point.has_hooks(dir="bwd")
    out["halved"] = model(tokens(1, 3))
    point.add_perma_hook(_half)
    point.remove_hooks()
    out["temporary"], out["permanent"] = point.has_hooks(including_permanent=False), point.has_hooks()
    out["halved for ever"] = model(tokens(1, 3))
    point.remove_hooks(including_permanent=True)
    out["at the end"] = point.has_hooks()
    return out


@scenario("plain")
def levels(lib: Library, model: Any) -> Outcome:
    name = "blocks.0.attn.hook_z"
    point = model.hook_dict[name]
    model.add_hook(name, _half, level=1)
    model.add_hook(name, _half, level=2)
    out: Outcome = {"levels": [handle.context_level for handle in point.fwd_hooks]}
    model.reset_hooks(level=2)
    out["after"] = [handle.context_level for handle in point.fwd_hooks]
    out["has"] = [point.has_hooks(level=1), point.has_hooks(level=2)]
    model.reset_hooks()
    return out


@scenario("plain")
def caching_hooks(lib: Library, model: Any) -> Outcome:
    kept, forward, backward = model.get_caching_hooks(lambda name: name.endswith("hook_z"), incl_bwd=True)
    with model.hooks(fwd_hooks=forward, bwd_hooks=backward):
        model(tokens(1, 3), return_type="loss").backward()
    out: Outcome = {"names": sorted(kept), "values": dict(kept)}
    cache = model.add_caching_hooks("blocks.0.hook_resid_mid")
    model(tokens(1, 3))
    out["added"] = dict(cache)
    model.reset_hooks()
    everything: dict[str, Any] = {}
    model.cache_some(everything, lambda name: "hook_attn_out" in name)
    model(tokens(1, 3))
    out["some"] = dict(everything)
    model.reset_hooks()
    return out


@scenario("plain")
def ablated_heads(lib: Library, model: Any) -> Outcome:
    def ablate(head: int, value: Any, hook: Any) -> Any:
        value[:, :, head] = value[:, :, head].mean(dim=(0, 1), keepdim=True)
        return value

    grid = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            hooks = [(lib.utils.get_act_name("z", layer), partial(ablate, head))]
            grid[layer, head] = model.run_with_hooks(tokens(2, 5), return_type="loss", fwd_hooks=hooks).detach()
    return {"grid": grid}


@scenario("plain", use_hook_tokens=True)
def permanent_padding_hooks(lib: Library, model: Any) -> Outcome:
    """Keys at padding masked by permanent hooks on the scores, as models of brackets are."""

    def record(given: Any, hook: Any) -> None:
        hook.ctx["padding"] = given == 0

    def mask(scores: Any, hook: Any) -> None:
        padding = model.hook_dict["hook_tokens"].ctx["padding"]
        scores.masked_fill_(padding[:, None, None, :], -1e5)

    given = tokens(2, 5)
    model.hook_dict["hook_tokens"].add_perma_hook(record)
    for block in model.blocks:
        block.attn.hook_attn_scores.add_perma_hook(mask)
    return {"logits": model(given), "again": model(given)}


@scenario()
def own_root_module(lib: Library) -> Outcome:
    class Net(lib.HookedRootModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(3, 4)
            self.hook_mid = lib.hook_points.HookPoint()
            self.second = torch.nn.Linear(4, 2)
            self.hook_out = lib.hook_points.HookPoint()
            self.setup()

        def forward(self, x: Any) -> Any:
            return self.hook_out(self.second(self.hook_mid(self.first(x).relu())))

    net = Net()
    for name, value in net.named_parameters():
        value.data = numbers(name, tuple(value.shape))
    given = numbers("input", (2, 3))
    logits, cache = net.run_with_cache(given)
    return {
        "names": sorted(net.hook_dict),
        "logits": logits,
        "cache": dict(cache),
        "edited": net.run_with_hooks(given, fwd_hooks=[("hook_mid", _half)]),
        "modules": sorted(net.mod_dict),
    }
