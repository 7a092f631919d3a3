"""What a model says of its weights: stacked, multiplied out, scored."""

from __future__ import annotations

from typing import Any

from tests.classic.library import Library
from tests.classic.rules import CONFIGS
from tests.classic.scenario import Outcome, scenario

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
MLP = ("W_in", "b_in", "W_out", "b_out")
DENSE = [name for name in CONFIGS if name not in ("experts",)]


@scenario(*CONFIGS)
def attention_weights(lib: Library, model: Any) -> Outcome:
    out = {name: getattr(model, name) for name in ATTENTION}
    return {**out, "W_E": model.W_E, "W_U": model.W_U, "b_U": model.b_U}


@scenario(*(name for name in DENSE if not name.startswith("attn_only")))
def mlp_weights(lib: Library, model: Any) -> Outcome:
    out = {name: getattr(model, name) for name in MLP}
    return {**out, "W_gate": model.W_gate} if model.cfg.gated_mlp else out


@scenario("plain", "attn_only", "shortformer")
def positions(lib: Library, model: Any) -> Outcome:
    return {"W_pos": model.W_pos, "W_E_pos": model.W_E_pos}


@scenario("plain", "grouped", "ungrouped", "llama", "wide_heads")
def circuits(lib: Library, model: Any) -> Outcome:
    return {
        "OV": model.OV.AB,
        "QK": model.QK.AB,
        "OV shape": list(model.OV.shape),
        "one OV": model.OV[1, 0].AB,
        "one QK": model.QK[0, 1].AB,
        "eigenvalues' sum": model.OV.eigenvalues.sum(-1).real,
        "of a layer": model.blocks[0].attn.OV.AB[:2],
    }


@scenario("plain", "attn_only", "wide_heads", "grouped")
def composition(lib: Library, model: Any) -> Outcome:
    return {mode: model.all_composition_scores(mode) for mode in ("Q", "K", "V")}


@scenario("plain", "wide_heads", "attn_only", "parallel", "gated")
def accumulated_biases(lib: Library, model: Any) -> Outcome:
    n_layers = model.cfg.n_layers
    out: Outcome = {"labels": model.all_head_labels()}
    for layer in range(n_layers + 1):
        if not model.cfg.attn_only:
            out[f"up to {layer}"] = model.accumulated_bias(layer)
        out[f"up to {layer} without MLPs"] = model.accumulated_bias(layer, include_mlp_biases=False)
    if not model.cfg.attn_only:
        out["to an MLP"] = model.accumulated_bias(1, mlp_input=True)
    return out


@scenario(*CONFIGS)
def counts(lib: Library, model: Any) -> Outcome:
    return {"n_params": model.cfg.n_params, "d_vocab_out": model.cfg.d_vocab_out}


@scenario("plain", "rotary", "attn_only", "grouped", "experts", "no_scale")
def config_values(lib: Library, model: Any) -> Outcome:
    fields = ("d_head", "d_mlp", "act_fn", "attn_scale", "eps", "rotary_dim", "n_key_value_heads", "use_attn_scale")
    more = ("init_mode", "n_ctx", "attn_only", "gated_mlp", "positional_embedding_type", "attention_dir", "final_rms")
    return {name: getattr(model.cfg, name) for name in (*fields, *more)}


@scenario("text_plain")
def singular_vectors(lib: Library, model: Any) -> Outcome:
    interpreter = lib.SVDInterpreter(model)
    out: Outcome = {
        "OV": interpreter.get_singular_vectors("OV", layer_index=0, num_vectors=3, head_index=1),
        "w_in": interpreter.get_singular_vectors("w_in", layer_index=1, num_vectors=2, head_index=0),
        "w_in alone": interpreter.get_singular_vectors("w_in", layer_index=1, num_vectors=2),
        "w_out": interpreter.get_singular_vectors("w_out", layer_index=0, num_vectors=4),
    }
    # The sign of a singular vector is free: without it, and the shapes as they are.
    return {name: value.abs() for name, value in out.items()}


@scenario()
def initial_weights(lib: Library) -> Outcome:
    """Distributions, since the generators differ."""
    out: Outcome = {}
    for mode in ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"):
        model = lib.new_model("plain", init_mode=mode, d_model=64, n_heads=4, d_head=16, d_mlp=256, d_vocab=100)
        zero = [name for name, value in model.named_parameters() if not value.any()]
        out[f"{mode} zeros"] = sorted(zero)
        for name in ("W_E", "W_Q", "W_in", "W_out"):
            weight = getattr(model, name)
            out[f"{mode} {name} spread"] = weight.std()
    return out
