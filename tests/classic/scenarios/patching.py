"""Every function of the module of activation patching."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.classic.library import Library
from tests.classic.rules import tokens
from tests.classic.scenario import Outcome, scenario

CLEAN, CORRUPTED = tokens(1, 5), tokens(1, 5, name="corrupted")
MODELS = ("plain", "rotary", "parallel", "grouped", "attn_only", "ungrouped", "gemma")
OF_HEADS = ("out", "q", "k", "v")


def _metric(logits: Any) -> Any:
    return logits[0, -1, 3] - logits[0, -1, 5]


def _run(lib: Library, model: Any, function: str) -> Any:
    _, cache = model.run_with_cache(CLEAN)
    return getattr(lib.patching, function)(model, CORRUPTED, cache, _metric)


@scenario("plain", "rotary", "grouped", "attn_only", "parallel", "gemma", "shortformer", "bidirectional")
def residual_stream(lib: Library, model: Any) -> Outcome:
    out: Outcome = {"resid_pre": _run(lib, model, "get_act_patch_resid_pre")}
    out["attn_out"] = _run(lib, model, "get_act_patch_attn_out")
    if not model.cfg.attn_only:
        out["mlp_out"] = _run(lib, model, "get_act_patch_mlp_out")
        if not model.cfg.parallel_attn_mlp:
            out["resid_mid"] = _run(lib, model, "get_act_patch_resid_mid")
            out["every"] = _run(lib, model, "get_act_patch_block_every")
    return out


def _by_query_head(model: Any) -> bool:
    """Return whether keys and values have the queries' heads: there the grids are for these alone."""
    return model.cfg.n_key_value_heads is None or model.cfg.ungroup_grouped_query_attention


@scenario(*MODELS)
def heads_by_position(lib: Library, model: Any) -> Outcome:
    names = OF_HEADS if _by_query_head(model) else ("out", "q")
    return {name: _run(lib, model, f"get_act_patch_attn_head_{name}_by_pos") for name in names}


@scenario(*MODELS)
def heads_at_all_positions(lib: Library, model: Any) -> Outcome:
    names = OF_HEADS if _by_query_head(model) else ("out", "q")
    return {name: _run(lib, model, f"get_act_patch_attn_head_{name}_all_pos") for name in names}


@scenario("plain", "attn_only", "grouped", "bidirectional")
def patterns(lib: Library, model: Any) -> Outcome:
    names = ("all_pos", "by_pos", "dest_src_pos")
    return {name: _run(lib, model, f"get_act_patch_attn_head_pattern_{name}") for name in names}


@scenario("plain")
def several_at_once(lib: Library, model: Any) -> Outcome:
    return {
        "all positions": _run(lib, model, "get_act_patch_attn_head_all_pos_every"),
        "by position": _run(lib, model, "get_act_patch_attn_head_by_pos_every"),
    }


@scenario("plain")
def own_setters_and_axes(lib: Library, model: Any) -> Outcome:
    import pandas

    _, cache = model.run_with_cache(CLEAN)
    generic = partial(lib.patching.generic_activation_patch, model, CORRUPTED, cache, _metric)

    def add(value: Any, index: Any, clean: Any) -> Any:
        _layer, pos = index
        value[:, pos] += clean[:, pos]
        return value

    rows = pandas.DataFrame({"layer": [0, 1, 1], "pos": [0, 2, 4]})
    rows_of_heads = pandas.DataFrame({"layer": [0, 1], "pos": [1, 4], "head": [1, 0]})
    of_positions, of_heads = lib.patching.layer_pos_patch_setter, lib.patching.layer_pos_head_vector_patch_setter
    grid, index = generic(of_positions, "attn_out", ["layer", "pos"], return_index_df=True)
    return {
        "added": generic(add, "resid_pre", ["layer", "pos"]),
        "of rows": generic(of_positions, "resid_post", index_df=rows),
        "of rows of heads": generic(of_heads, "z", index_df=rows_of_heads),
        "grid": grid,
        "columns": list(index.columns),
        "index": index.to_numpy().tolist(),
        "ranges": lib.patching.make_df_from_ranges([2, 3], ["a", "b"]).to_numpy().tolist(),
        "of vectors": generic(lib.patching.layer_head_vector_patch_setter, "v", ["layer", "head"]),
    }


@scenario("plain")
def setters_by_hand(lib: Library, model: Any) -> Outcome:
    _, clean = model.run_with_cache(CLEAN)
    _, cache = model.run_with_cache(CORRUPTED)
    module = lib.patching
    return {
        "layer_pos": module.layer_pos_patch_setter(cache["resid_pre", 1].clone(), [1, 2], clean["resid_pre", 1]),
        "layer_pos_head": module.layer_pos_head_vector_patch_setter(cache["z", 1].clone(), [1, 2, 0], clean["z", 1]),
        "layer_head": module.layer_head_vector_patch_setter(cache["z", 1].clone(), [1, 0], clean["z", 1]),
        "pattern": module.layer_head_pattern_patch_setter(cache["pattern", 1].clone(), [1, 0], clean["pattern", 1]),
        "dest_src": module.layer_head_dest_src_pos_pattern_patch_setter(
            cache["pattern", 1].clone(), [1, 0, 3, 2], clean["pattern", 1]
        ),
    }
