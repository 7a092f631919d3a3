"""The methods of an activation cache."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import parameter, tokens
from tests.classic.scenario import Outcome, scenario

MOST = ("plain", "attn_only", "parallel", "rms", "ln_pre", "no_norm", "grouped", "llama", "both_sides", "shortformer")
STREAMS = tuple(config for config in MOST if config != "shortformer")
SPLIT = tuple(config for config in MOST if config != "both_sides")
SLICES: dict[str, Any] = {"last": -1, "first": 0, "two": (1, 3), "picked": [0, 2], "none": None}


def _cache(model: Any, batch: int = 2, **keywords: Any) -> Any:
    return model.run_with_cache(tokens(batch, 4), **keywords)[1]


@scenario(*MOST)
def accumulated(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    values, labels = cache.accumulated_resid(return_labels=True)
    out = {"values": values, "labels": labels, "to layer 1": cache.accumulated_resid(1)}
    out["to the last"] = cache.accumulated_resid(-1)
    out["normed"] = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    if "blocks.0.hook_resid_mid" in cache:
        out["with mid"], out["labels with mid"] = cache.accumulated_resid(incl_mid=True, return_labels=True)
        out["to an MLP"], out["labels to an MLP"] = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
        out["normed for an MLP"] = cache.accumulated_resid(1, mlp_input=True, apply_ln=True)
    out["normed for layer 1"] = cache.accumulated_resid(1, apply_ln=True)
    return out


@scenario(*STREAMS)
def decomposed(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    values, labels = cache.decompose_resid(return_labels=True)
    out = {"values": values, "labels": labels, "attention": cache.decompose_resid(mode="attn")}
    out["normed"] = cache.decompose_resid(apply_ln=True, pos_slice=-1)
    out["to layer 1"], out["labels to layer 1"] = cache.decompose_resid(1, return_labels=True)
    out["without embeddings"] = cache.decompose_resid(incl_embeds=False, pos_slice=(1, 3))
    if not model.cfg.attn_only:
        out["MLPs"], out["labels of MLPs"] = cache.decompose_resid(mode="mlp", return_labels=True)
        out["to an MLP"] = cache.decompose_resid(1, mlp_input=True)
    return out


@scenario(*SPLIT)
def head_results(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    values, labels = cache.stack_head_results(return_labels=True)
    out = {"values": values, "labels": labels, "last": cache.stack_head_results(pos_slice=-1)}
    out["one layer with the remainder"] = cache.stack_head_results(1, incl_remainder=True, pos_slice=-1)
    out["normed"] = cache.stack_head_results(apply_ln=True, pos_slice=-1)
    out["no layer"] = list(cache.stack_head_results(0).shape)
    out["remainder of none"], out["its label"] = cache.stack_head_results(0, incl_remainder=True, return_labels=True)
    cache.compute_head_results()
    out["result"] = cache["result", 1]
    return out


@scenario("plain", "gated", "parallel", "ln_pre", "rms", "wide_heads")
def neuron_results(lib: Library, model: Any) -> Outcome:
    cache = _cache(model, batch=1)
    out: Outcome = {"one layer": cache.get_neuron_results(1, pos_slice=-1)}
    out["some"] = cache.get_neuron_results(0, neuron_slice=(1, 4), pos_slice=1)
    values, labels = cache.stack_neuron_results(-1, pos_slice=-1, return_labels=True)
    out["values"], out["labels"] = values, labels
    out["some of each"] = cache.stack_neuron_results(2, neuron_slice=[0, 5], pos_slice=-1, incl_remainder=True)
    out["normed"] = cache.stack_neuron_results(1, neuron_slice=(0, 3), pos_slice=-1, apply_ln=True)
    direction = parameter("direction", (model.cfg.d_model,))
    out["projected"] = cache.stack_neuron_results(-1, pos_slice=-1, project_output_onto=direction)
    directions = parameter("directions", (model.cfg.d_model, 3))
    out["projected onto some"] = cache.stack_neuron_results(1, neuron_slice=(0, 2), project_output_onto=directions)
    return out


@scenario("plain", "gated", "parallel", "rms", "no_norm", "ln_pre", "grouped")
def full_decomposition(lib: Library, model: Any) -> Outcome:
    cache = _cache(model, batch=1)
    out: Outcome = {}
    values, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    out["values"], out["labels"] = values, labels
    out["normed"] = cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True, pos_slice=-1)
    neurons, out["labels of neurons"] = cache.get_full_resid_decomposition(pos_slice=-1, return_labels=True)
    out["sum of neurons"] = neurons.sum(0)
    out["to layer 1"] = cache.get_full_resid_decomposition(1, expand_neurons=False, pos_slice=-1)
    out["to an MLP"] = cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=False, pos_slice=-1)
    direction = parameter("direction", (model.cfg.d_model,))
    out["projected"] = cache.get_full_resid_decomposition(pos_slice=-1, project_output_onto=direction)
    return out


@scenario("plain", "ln_pre", "rms", "attn_only", "no_norm")
def attributed_logits(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    stack, last = cache.decompose_resid(), cache.decompose_resid(pos_slice=-1)
    right, wrong = torch.tensor([3, 4]), torch.tensor([5, 6])
    out: Outcome = {
        "one token": cache.logit_attrs(stack, 3),
        "a tensor": cache.logit_attrs(stack, torch.tensor(3)),
        "by prompt": cache.logit_attrs(last, right, pos_slice=-1),
        "differences": cache.logit_attrs(last, right, wrong, pos_slice=-1),
        "one against another": cache.logit_attrs(stack, 3, 5),
        "by position": cache.logit_attrs(stack, tokens(2, 4, name="right"), tokens(2, 4, name="wrong")),
    }
    for name, pos in SLICES.items():
        sliced = cache.decompose_resid(pos_slice=pos)
        out[f"at {name}"] = cache.logit_attrs(sliced, 3, 5, pos_slice=pos)
    return out


@scenario("ln_pre", "rms_pre")
def attributed_logits_of_some_prompts(lib: Library, model: Any) -> Outcome:
    cache = model.run_with_cache(tokens(3, 4))[1]
    stack, last = cache.decompose_resid(), cache.decompose_resid(pos_slice=-1)
    right, wrong = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])
    out: Outcome = {}
    for name, batch in {"first": 0, "two": (0, 2), "picked": [0, 2], "all": None}.items():
        out[f"one token for {name}"] = cache.logit_attrs(stack, 3, batch_slice=batch)
        chosen = [lib.utils.Slice(batch).apply(one, dim=0) for one in (right, wrong)]
        out[f"differences for {name}"] = cache.logit_attrs(last, *chosen, pos_slice=-1, batch_slice=batch)
    out["the last of two"] = cache.logit_attrs(last, 3, 4, pos_slice=-1, batch_slice=(1, 3))
    out["normed"] = cache.apply_ln_to_stack(stack, batch_slice=(1, 3))
    out["one normed"] = cache.apply_ln_to_stack(stack, batch_slice=1)
    return out


@scenario("plain", "ln_pre", "rms", "no_norm", "rms_pre")
def normed_stacks(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    stack = cache.decompose_resid()
    out: Outcome = {"final": cache.apply_ln_to_stack(stack)}
    out["for layer 1"] = cache.apply_ln_to_stack(stack[:3], layer=1)
    out["for an MLP"] = cache.apply_ln_to_stack(stack[:3], layer=0, mlp_input=True)
    out["last"] = cache.apply_ln_to_stack(stack[:, :, -1], pos_slice=-1)
    out["recomputed"] = cache.apply_ln_to_stack(stack, recompute_ln=True)
    return out


@scenario("ln_pre", "rms_pre")
def no_batch(lib: Library, model: Any) -> Outcome:
    cache = _cache(model, batch=1).remove_batch_dim()
    stack = cache.decompose_resid()
    out: Outcome = {
        "shapes": {name: list(value.shape) for name, value in cache.items()},
        "stack": stack,
        "has_batch_dim": cache.has_batch_dim,
        "attributed": cache.logit_attrs(stack, 3, 5, has_batch_dim=False),
        "attributed at the last": cache.logit_attrs(
            cache.decompose_resid(pos_slice=-1), 3, pos_slice=-1, has_batch_dim=False
        ),
        "normed": cache.apply_ln_to_stack(stack, has_batch_dim=False),
        "heads": cache.stack_head_results(pos_slice=-1),
        "accumulated": cache.accumulated_resid(apply_ln=True),
        "neurons": cache.stack_neuron_results(1, neuron_slice=(0, 2), pos_slice=-1),
    }
    direct = model.run_with_cache(tokens(1, 4), remove_batch_dim=True)[1]
    out["direct shapes"] = {name: list(value.shape) for name, value in direct.items()}
    return out


@scenario("plain")
def sliced_batches(lib: Library, model: Any) -> Outcome:
    cache = model.run_with_cache(tokens(3, 4))[1]
    out: Outcome = {}
    for name, batch in {"first": 0, "last": -1, "two": (0, 2), "picked": [0, 2]}.items():
        sliced = cache.apply_slice_to_batch_dim(batch)
        out[f"shapes of {name}"] = {key: list(value.shape) for key, value in sliced.items()}
        out[f"has_batch_dim of {name}"] = sliced.has_batch_dim
        out[f"z of {name}"] = sliced["z", 0]
    return out


@scenario("plain", "attn_only")
def keys(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    out: Outcome = {
        "embed": cache["embed"],
        "q": cache["q", 0],
        "k of a string": cache["k1a"],
        "scale": cache["scale", 1, "ln1"],
        "scale of a string": cache["scale1ln1"],
        "final scale": cache["scale"],
        "last": cache["resid_post", -1],
        "first from the end": cache["resid_pre", -model.cfg.n_layers],
        "attn": cache["attn", 0],
        "attn_scores": cache["attn_scores", 1],
        "length": len(cache),
        "known": "blocks.0.attn.hook_z" in cache,
        "unknown": "blocks.7.attn.hook_z" in cache,
        "stacked": cache.stack_activation("z"),
        "stacked to layer 1": cache.stack_activation("pattern", 1),
        "stacked norms": cache.stack_activation("scale", -1, "ln1"),
    }
    return out


@scenario("plain", "grouped", "rotary")
def positions_of_a_cache(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    for name, pos in SLICES.items():
        # There the rotated queries and keys lose heads, not positions.
        names = [name for name in model.run_with_cache(tokens(2, 4))[1] if "rot" not in name]
        cache = model.run_with_cache(tokens(2, 4), names_filter=names, pos_slice=pos)[1]
        out[f"shapes at {name}"] = {key: list(value.shape) for key, value in cache.items()}
        out[f"z at {name}"], out[f"pattern at {name}"] = cache["z", 0], cache["pattern", 1]
    return out


@scenario("plain")
def detached(lib: Library, model: Any) -> Outcome:
    cache = _cache(model)
    return {
        "requires_grad": {name: value.requires_grad for name, value in cache.items()},
        "array": cache["z", 0].numpy(),
        "model": cache.model is model,
        "is a dict": isinstance(cache.cache_dict, dict),
    }


@scenario("plain")
def filters(lib: Library, model: Any) -> Outcome:
    def names(**keywords: Any) -> dict[str, bool]:
        return dict.fromkeys(model.run_with_cache(tokens(1, 3), **keywords)[1].keys(), True)

    plain = model.run_with_cache(tokens(1, 3), return_cache_object=False)[1]
    return {
        "one": names(names_filter="hook_embed"),
        "some": names(names_filter=["hook_embed", "blocks.0.attn.hook_z"]),
        "chosen": names(names_filter=lambda name: name.endswith("hook_z")),
        "stopped": names(stop_at_layer=1),
        "started": dict.fromkeys(model.run_with_cache(torch.ones(1, 3, 8), start_at_layer=1)[1].keys(), True),
        "a dict": type(plain) is dict,
        "names of the dict": dict.fromkeys(plain, True),
    }
