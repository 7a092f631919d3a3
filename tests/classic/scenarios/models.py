"""Parameters, logits, losses, activations and gradients of every config."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import CONFIGS, TEXT_CONFIGS, tokens
from tests.classic.scenario import Outcome, scenario

TARGETS = [name for name in CONFIGS if name != "vocab_out"]  # where a loss is defined


@scenario(*CONFIGS, *TEXT_CONFIGS)
def parameters(lib: Library, model: Any) -> Outcome:
    return {"shapes": {name: list(value.shape) for name, value in model.named_parameters()}}


@scenario(*CONFIGS)
def logits(lib: Library, model: Any) -> Outcome:
    return {
        "two prompts": model(tokens(2, 6)),
        "one prompt of one token": model(tokens(1, 1)),
        "the whole context": model(tokens(1, 12, name="long"))[:, -3:],
        "no batch": model(tokens(1, 4)[0]),
        "nothing": model(tokens(1, 3), return_type=None),
    }


@scenario(*TARGETS)
def losses(lib: Library, model: Any) -> Outcome:
    both = model(tokens(2, 6), return_type="both")
    return {
        "loss": model(tokens(2, 6), return_type="loss"),
        "per token": model(tokens(2, 6), return_type="loss", loss_per_token=True),
        "both logits": both[0][:, -1],
        "both loss": both[1],
        "named logits": both.logits[:, -1],
        "named loss": both.loss,
    }


@scenario(*CONFIGS)
def activations(lib: Library, model: Any) -> Outcome:
    _, cache = model.run_with_cache(tokens(2, 5))
    return {"names": dict.fromkeys(cache.keys(), True), "values": dict(cache.items())}


@scenario(*TARGETS)
def weight_gradients(lib: Library, model: Any) -> Outcome:
    model(tokens(2, 5), return_type="loss").backward()
    return {"gradients": {name: value.grad for name, value in model.named_parameters() if value.grad is not None}}


@scenario(
    "plain", "attn_only", "shortformer", "parallel", "grouped_rotary", "ungrouped", "both_sides", "rms", "solu_ln"
)
def activation_gradients(lib: Library, model: Any) -> Outcome:
    _, cache = model.run_with_cache(tokens(1, 4), return_type="loss", incl_bwd=True)
    gradients = {name: value for name, value in cache.items() if name.endswith("_grad")}
    return {"names": dict.fromkeys(gradients, True), "values": gradients}


@scenario(*CONFIGS)
def logits_under_masks(lib: Library, model: Any) -> Outcome:
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    right = left.flip(-1)
    holes = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    out = {}
    for name, mask in {"left": left, "right": right, "holes": holes}.items():
        # What stands at a masked position itself is nobody's business.
        out[name] = model(tokens(2, 5), attention_mask=mask)[mask.bool()]
    return out


@scenario(*CONFIGS)
def partial_runs(lib: Library, model: Any) -> Outcome:
    if model.cfg.positional_embedding_type == "shortformer":
        return {"embeddings": model(tokens(1, 4), stop_at_layer=0)}
    middle = model(tokens(1, 4), stop_at_layer=1)
    embedded = model.input_to_embed(tokens(1, 4))[0]
    last = model.cfg.n_layers - 1
    return {
        "embeddings": model(tokens(1, 4), stop_at_layer=0),
        "input_to_embed": embedded,
        "after one": middle,
        "from the last": model(middle, start_at_layer=last),
        "without the last": model(tokens(1, 4), stop_at_layer=-1),
        "one layer": model(embedded, start_at_layer=0, stop_at_layer=1),
    }


@scenario("plain", "alibi", "rotary", "grouped", "attn_only", "parallel", "experts", "gated", "solu_ln", "shortformer")
def hook_names(lib: Library, model: Any) -> Outcome:
    return {"names": dict.fromkeys(model.hook_dict, True), "same": len(model.hook_points()) == len(model.hook_dict)}


FLAGGED = ("plain", "grouped", "ungrouped", "attn_only", "parallel", "shortformer", "both_sides", "rotary")


def _flagged(model: Any, flag: str) -> Outcome:
    getattr(model, f"set_{flag}")(True)
    plain, cache = model.run_with_cache(tokens(1, 4))
    names = ("hook_result", "_input", "_in")
    return {
        "names": dict.fromkeys(cache.keys(), True),
        "logits": plain,
        "values": {name: value for name, value in cache.items() if name.endswith(names)},
    }


@scenario(*FLAGGED)
def cache_with_attn_result(lib: Library, model: Any) -> Outcome:
    return _flagged(model, "use_attn_result")


@scenario(*FLAGGED)
def cache_with_split_qkv_input(lib: Library, model: Any) -> Outcome:
    return _flagged(model, "use_split_qkv_input")


@scenario("plain", "attn_only", "parallel", "rotary")
def cache_with_attn_in(lib: Library, model: Any) -> Outcome:
    return _flagged(model, "use_attn_in")


@scenario("plain", "rotary", "both_sides")
def cache_with_hook_mlp_in(lib: Library, model: Any) -> Outcome:
    return _flagged(model, "use_hook_mlp_in")


@scenario("plain", use_hook_tokens=True)
def cache_with_hook_tokens(lib: Library, model: Any) -> Outcome:
    _, cache = model.run_with_cache(tokens(1, 4))
    return {"names": {name: True for name in cache if name != "hook_tokens"}}


@scenario("grouped", "grouped_rotary", "llama")
def ungrouping_a_built_model(lib: Library, model: Any) -> Outcome:
    model.set_ungroup_grouped_query_attention(True)
    plain, cache = model.run_with_cache(tokens(1, 4))
    shapes = {name: list(value.shape) for name, value in cache.items() if name.startswith("blocks.0.attn")}
    return {"logits": plain, "shapes": shapes, "v": cache["v", 1], "k": cache["k", 1]}
