"""What each processing step makes of the weights, alone and with the others."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import parameter, tokens
from tests.classic.scenario import Outcome, scenario

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
NORMED = ("plain", "attn_only", "rms", "rotary", "grouped_rotary", "llama", "parallel", "both_sides")


def _raw(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _values(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters of a state dict."""
    buffers = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    return {name: value for name, value in state.items() if not name.endswith(buffers)}


def _loaded(lib: Library, model: Any, config: str | None = None, **steps: bool) -> Outcome:
    """Return what a fresh model is once it has loaded and processed another's weights."""
    cfg = lib.HookedTransformerConfig.from_dict({**model.cfg.to_dict(), "seed": 3, "init_weights": True})
    other = lib.HookedTransformer(cfg)
    other.load_and_process_state_dict(_raw(model), **{**dict.fromkeys(STEPS, False), **steps})
    return {"logits": other(tokens(2, 5)), "values": _values(other.state_dict())}


@scenario(*NORMED)
def loading_with_folded_norms(lib: Library, model: Any) -> Outcome:
    return {"logits": _loaded(lib, model, fold_ln=True)["logits"]}


@scenario("plain", "attn_only", "alibi", "parallel", "wide_heads")
def loading_with_centred_writing(lib: Library, model: Any) -> Outcome:
    return _loaded(lib, model, center_writing_weights=True)


@scenario("plain", "rms", "vocab_out")
def loading_with_centred_unembedding(lib: Library, model: Any) -> Outcome:
    return _loaded(lib, model, center_unembed=True)


@scenario("plain", "grouped", "attn_only", "rotary", "llama")
def loading_with_folded_value_biases(lib: Library, model: Any) -> Outcome:
    return _loaded(lib, model, fold_value_biases=True)


@scenario("plain", "attn_only")
def loading_with_factored_attention(lib: Library, model: Any) -> Outcome:
    out = _loaded(lib, model, refactor_factored_attn_matrices=True)
    # Singular vectors have a free sign, so the products are compared.
    return {"logits": out["logits"]}


@scenario("plain", "attn_only", "rms", "rotary", "llama", "parallel", "grouped_rotary", "alibi")
def loading_with_all_steps(lib: Library, model: Any) -> Outcome:
    steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True)
    if model.cfg.normalization_type == "RMS":
        steps["center_writing_weights"] = False
    return {"log probs": _loaded(lib, model, **steps)["logits"].log_softmax(-1)}


def _unfolded(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return weights with gains (and biases) of norms, for a model that has only folded ones."""
    state = _raw(model)
    names = [f"blocks.{layer}.{norm}" for layer in range(model.cfg.n_layers) for norm in ("ln1", "ln2")]
    for norm in [*names, "ln_final"]:
        state[f"{norm}.w"] = parameter(f"{norm}.w", (model.cfg.d_model,))
        if kind == "LN":
            state[f"{norm}.b"] = parameter(f"{norm}.b", (model.cfg.d_model,))
    return state


@scenario("ln_pre", "rms_pre")
def unfolded_weights_in_a_folded_config(lib: Library, model: Any) -> Outcome:
    kind = model.cfg.normalization_type.removesuffix("Pre")
    model.load_and_process_state_dict(
        _unfolded(model, kind), fold_ln=True, center_writing_weights=kind == "LN", fold_value_biases=False
    )
    return {"logits": model(tokens(2, 5)), "values": _values(model.state_dict())}


@scenario("ln_pre", "rms_pre")
def all_steps_on_unfolded_weights(lib: Library, model: Any) -> Outcome:
    kind = model.cfg.normalization_type.removesuffix("Pre")
    model.load_and_process_state_dict(_unfolded(model, kind), center_writing_weights=kind == "LN")
    return {"logits": model(tokens(2, 5)), "values": _values(model.state_dict())}


@scenario("plain", "attn_only", "rms", "llama")
def steps_on_state_dicts(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    if model.cfg.normalization_type == "RMS":
        out["folded"] = _values(model.fold_layer_norm(_raw(model), fold_biases=False, center_weights=False))
    else:
        out["folded"] = _values(model.fold_layer_norm(_raw(model)))
    out["centred"] = _values(model.center_writing_weights(_raw(model)))
    out["unembedding"] = model.center_unembed(_raw(model))["unembed.W_U"]
    out["value biases"] = _values(model.fold_value_biases(_raw(model)))
    return out


@scenario("plain", "rms")
def parts_of_folding(lib: Library, model: Any) -> Outcome:
    return {
        "no biases": _values(model.fold_layer_norm(_raw(model), fold_biases=False, center_weights=True)),
        "not centred": _values(model.fold_layer_norm(_raw(model), fold_biases=True, center_weights=False)),
    }


@scenario("plain", "attn_only")
def factored_matrices_of_a_state_dict(lib: Library, model: Any) -> Outcome:
    state = model.refactor_factored_attn_matrices(_raw(model))
    value, output = state["blocks.0.attn.W_V"], state["blocks.0.attn.W_O"]
    query, key = state["blocks.0.attn.W_Q"], state["blocks.0.attn.W_K"]
    return {
        "OV": value @ output,
        "QK": query @ key.transpose(-1, -2),
        "norms of values": value.norm(dim=-2),
        "norms of outputs": output.norm(dim=-1),
        "norms of queries": query.norm(dim=-2),
        "norms of keys": key.norm(dim=-2),
        "b_V": state["blocks.0.attn.b_V"],
        "b_O": state["blocks.0.attn.b_O"],
    }


@scenario("plain", "ln_pre", "rms", "parallel")
def process_weights_in_place(lib: Library, model: Any) -> Outcome:
    rms = model.cfg.normalization_type == "RMS"
    model.process_weights_(center_writing_weights=not rms)
    return {"log probs": model(tokens(2, 5)).log_softmax(-1)}


@scenario("plain")
def missing_keys_are_filled(lib: Library, model: Any) -> Outcome:
    state = _raw(model)
    del state["blocks.1.attn.b_Q"], state["unembed.b_U"]
    filled = model.fill_missing_keys(state)
    return {
        "names": dict.fromkeys(_values(filled), True),
        "same": torch.equal(filled["unembed.b_U"], model.unembed.b_U),
    }


@scenario("plain")
def recipe_for_toy_models(lib: Library, model: Any) -> Outcome:
    """The way trained toy models are loaded: buffers dropped, centred and folded as a state dict, then loaded."""
    state = _raw(model)
    for layer in range(model.cfg.n_layers):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(12, 12).tril().bool()
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    fields = {**model.cfg.to_dict(), "normalization_type": "LNPre"}
    fresh = lib.HookedTransformer(lib.HookedTransformerConfig.from_dict(fields))
    state = fresh.fold_layer_norm(fresh.center_writing_weights(fresh.center_unembed(state)))
    fresh.load_state_dict(state, strict=False)
    return {"log probs": fresh(tokens(2, 5)).log_softmax(-1)}
