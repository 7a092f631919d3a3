"""`hooked-lm info`: a description of a model, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_lm._support.plain_data import PlainData
from hooked_lm.cli.inputs import IgnoredFields, ModelName, Revision, one_line_errors
from hooked_lm.cli.outputs import JsonPath, check_outputs, give_out

if TYPE_CHECKING:
    from hooked_lm.config import HookedTransformerConfig
    from hooked_lm.transformer import HookedTransformer

__all__ = ["describe", "info", "report"]

_NORMS = {"LN": "LayerNorm", "LNPre": "LayerNorm without gain", "RMS": "RMSNorm", "RMSPre": "RMSNorm without gain"}
_PLACES = {
    "before": "before attention and MLP",
    "before_and_after": "before and after attention and MLP",
    "after": "on what attention and MLP write",
    "residual": "on the residual stream after each write",
}


Kernels = Annotated[
    bool, typer.Option("--kernels", help="Say too which kernels compute matrix products on this machine's processor.")
]
Memory = Annotated[
    bool, typer.Option("--memory", help="Say too how much memory weights, cache and activations take, by precision.")
]


def info(
    model: ModelName,
    kernels: Kernels = False,
    memory: Memory = False,
    json_path: JsonPath = None,
    revision: Revision = None,
    ignored: IgnoredFields = None,
) -> None:
    """Say what a model is: its architecture, its size, its tokenizer, its hook points."""
    with one_line_errors():
        check_outputs(json_path)
        loaded = _loaded(model, revision, ignored or ())
        data = describe(loaded)
        if kernels:
            from hooked_lm.components.kernels import describe_kernels

            data["kernels"] = describe_kernels()
        text = report(data)
        if memory:
            from hooked_lm.cli.memory import PRECISIONS, memory_report, memory_use

            uses = {name: memory_use(loaded.cfg, dtype) for name, dtype in PRECISIONS.items()}
            data["memory"] = {name: asdict(use) for name, use in uses.items()}
            text += f"\n{memory_report(uses)}"
        give_out(text, data, json_path)


def _loaded(model: str, revision: str | None, ignored: Sequence[str]) -> HookedTransformer:
    """The model; of a folder without weights, one that has none."""
    import torch

    from hooked_lm.transformer import HookedTransformer
    from weight_conversion.config_only import read_config, without_weights

    if without_weights(model):
        cfg = read_config(model, ignored).replace(init_weights=False, device=None, tokenizer_name=None)
        with torch.device("meta"):
            return HookedTransformer(cfg, move_to_device=False)
    # Without processing: the weights as they were trained, and those that are not needed are not read.
    return HookedTransformer.from_pretrained_no_processing(model, revision=revision, ignore_config_fields=ignored)


def describe(model: HookedTransformer) -> PlainData:
    """Return the description as plain data. `processing` lists the steps that `from_pretrained` would add."""
    from hooked_lm.weights import plan_processing

    cfg, fields = model.cfg, model.cfg.to_dict()
    sites = model.hook_names()
    return {
        "model": cfg.model_name,
        "architecture": fields["original_architecture"],
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_key_value_heads": cfg.n_kv_heads,
        "d_model": cfg.d_model,
        "d_head": cfg.d_head,
        "d_mlp": None if cfg.attn_only else cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "d_vocab_out": cfg.d_vocab_out,
        "n_ctx": cfg.n_ctx,
        "mlp": _mlp(cfg),
        "positions": _positions(cfg),
        "norm": _norm(cfg),
        "attention": _attention(cfg),
        "activation": None if cfg.attn_only else cfg.act_fn,
        "tied_embeddings": cfg.tie_word_embeddings,
        "n_parameters": model.n_params_total,
        "n_parameters_of_attention_and_mlps": cfg.n_params,
        "dtype": fields["dtype"],
        "processed": list(model.processed),
        "processing": [step for step in plan_processing(cfg, {}) if step not in model.processed],
        "tokenizer": _tokenizer(model),
        "n_hook_points": len(sites),
        "hook_points": _examples(model, sites),
        "config": fields,
    }


def report(data: PlainData) -> str:
    """Return the description as text."""
    heads = f"{data['n_heads']} a layer, {data['d_head']} wide"
    if data["n_key_value_heads"] != data["n_heads"]:
        heads += f", sharing {data['n_key_value_heads']} heads of keys and values"
    vocabulary = f"{data['d_vocab']:,} tokens"
    if data["d_vocab_out"] != data["d_vocab"]:
        vocabulary += f" in, {data['d_vocab_out']:,} out"
    lines = {
        "architecture": data["architecture"] or "custom",
        "layers": str(data["n_layers"]),
        "heads": heads,
        "residual stream": f"{data['d_model']} wide",
        "MLP": data["mlp"],
        "attention": data["attention"],
        "positions": data["positions"],
        "norm": data["norm"],
        "vocabulary": vocabulary,
        "context": f"{data['n_ctx']:,} tokens",
        "embeddings": f"{'tied' if data['tied_embeddings'] else 'not tied'} to the unembedding",
        "parameters": f"{data['n_parameters']:,}, of which {data['n_parameters_of_attention_and_mlps']:,} are weights "
        "of attention and MLPs",
        "precision": data["dtype"],
        "processing": _processing(data["processed"], data["processing"]),
        "tokenizer": _about_tokenizer(data["tokenizer"]),
        "hook points": f"{data['n_hook_points']}, such as",
    }
    width = max(map(len, lines)) + 2
    text = "\n".join([data["model"], *(f"  {name:<{width}}{said}" for name, said in lines.items())])
    text += "".join(f"\n{' ' * (width + 4)}{name}" for name in data["hook_points"])
    kernels = data.get("kernels", {})
    width = max((len(name) for name in kernels), default=0) + 2
    return text + "".join(f"\n  {name:<{width}}{said}" for name, said in kernels.items())


def _mlp(cfg: HookedTransformerConfig) -> str:
    if cfg.attn_only:
        return "none"
    kind = f"{'gated, ' if cfg.gated_mlp else ''}{cfg.act_fn}"
    beside = ", in parallel with attention" if cfg.parallel_attn_mlp else ""
    if cfg.num_experts is None:
        return f"{cfg.d_mlp} wide, {kind}{beside}"
    experts = f"{cfg.num_experts} experts {cfg.expert_width} wide, {cfg.experts_per_token} for a token"
    experts += f", {cfg.identity_experts} of them identities" if cfg.identity_experts else ""
    if cfg.shortcut_experts:
        return f"{cfg.d_mlp} wide, {kind}; beside it in every second layer {experts}, whose output the next layer adds"
    n_sparse = sum(map(cfg.has_experts, range(cfg.n_layers)))
    layers = (
        "" if n_sparse == cfg.n_layers else f" in {n_sparse} layers of {cfg.n_layers}, one of {cfg.d_mlp} elsewhere"
    )
    shared = f", and one of {cfg.d_shared_expert} for every token" if cfg.d_shared_expert else ""
    return f"{experts}{shared}{layers}, {kind}{beside}"


def _positions(cfg: HookedTransformerConfig) -> str:
    kind = cfg.positional_embedding_type
    if kind != "rotary":
        return {
            "standard": "learned, added to the residual stream",
            "shortformer": "learned, added to queries and keys only",
            "alibi": "ALiBi: scores fall with distance",
            "none": "none",
        }[kind]
    said = f"rotary, {cfg.rotary_dim} of {cfg.d_head} dimensions, base {cfg.rotary_base:g}"
    if cfg.rotary_base_local is not None:
        said += f" ({cfg.rotary_base_local:g} in local layers)"
    scalings = {
        "Llama-3 scaling": cfg.use_NTK_by_parts_rope,
        "YaRN": cfg.use_yarn_rope,
        "dynamic NTK scaling": cfg.use_dynamic_rope,
        "LongRoPE": cfg.use_longrope,
        f"positions divided by {cfg.rotary_scaling_factor:g}": cfg.rotary_scaling_factor != 1.0,
    }
    n_rotated = sum(map(cfg.rotates, range(cfg.n_layers)))
    only = [] if n_rotated == cfg.n_layers else [f"in {n_rotated} layers of {cfg.n_layers}"]
    return ", ".join([said, *(name for name, used in scalings.items() if used), *only])


def _norm(cfg: HookedTransformerConfig) -> str:
    if cfg.normalization_type is None:
        said = "none"
    else:
        kind = _NORMS[cfg.normalization_type]
        final = ("a final RMSNorm" if cfg.final_rms else "a final one") if cfg.final_norm else "no final one"
        final += "" if cfg.unembed_act_fn is None else f", a {cfg.unembed_act_fn} layer and one more"
        place = _PLACES[cfg.norm_placement].replace(" and MLP", "" if cfg.attn_only else " and MLP")
        said = f"{kind}, {place}; {final}; eps {cfg.eps:g}"
    said += "; after the embedding" if cfg.post_embedding_ln else ""
    said += "; none before the first attention" if not cfg.first_norm else ""
    return f"{said}; {_NORMS[cfg.qk_norm_type]} on queries and keys" if cfg.use_qk_norm else said


def _attention(cfg: HookedTransformerConfig) -> str:
    said = cfg.attention_dir
    windows = [cfg.window(layer) for layer in range(cfg.n_layers)]
    n_local = sum(window is not None for window in windows)
    if n_local:
        said += f", a window of {cfg.window_size} in {n_local} layers of {cfg.n_layers}"
    said += ", sinks" if cfg.attention_sinks else ""
    said += ", gated" if cfg.attention_gate else ""
    return f"{said}, scores capped at {cfg.attn_scores_soft_cap:g}" if cfg.attn_scores_soft_cap > 0 else said


def _processing(done: Sequence[str], planned: Sequence[str]) -> str:
    before = f"{', '.join(done)} as stored; " if done else ""
    return f"{before}from_pretrained applies {', '.join(planned) if planned else 'nothing'}"


def _tokenizer(model: HookedTransformer) -> PlainData | None:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    return {
        "class": type(tokenizer).__name__,
        "n_tokens": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "prepends_bos": model.cfg.default_prepend_bos,
    }


def _about_tokenizer(tokenizer: PlainData | None) -> str:
    if tokenizer is None:
        return "none: prompts are token numbers"
    about = f"{tokenizer['class']}, {tokenizer['n_tokens']:,} tokens"
    if tokenizer["bos_token"] is None:
        return f"{about}; no start token"
    start = "put in front of a prompt" if tokenizer["prepends_bos"] else "not put in front of a prompt"
    return f"{about}; the start token {tokenizer['bos_token']!r} is {start}"


def _examples(model: HookedTransformer, sites: Sequence[str]) -> list[str]:
    """Hook points of each kind: of a block, of attention, of an MLP; a few names that this model has."""
    last = max(model.cfg.n_layers - 1, 0)
    wanted = (
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_pattern",
        f"blocks.{last}.mlp.hook_post",
        f"blocks.{last}.hook_resid_post",
    )
    return [name for name in wanted if name in sites]
