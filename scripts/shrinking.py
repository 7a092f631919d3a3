"""Shrink the config of a published checkpoint to a tiny model of the same architecture."""

from __future__ import annotations

from weight_conversion.fields import FieldValue, HFConfig

__all__ = ["LAYERS", "VOCABULARY", "shrunk"]

LAYERS, HEADS, D_HEAD, D_MLP, EXPERTS, VOCABULARY, CONTEXT = 4, 4, 16, 48, 4, 96, 64
D_MODEL = HEADS * D_HEAD
WINDOW, TRAINED_CONTEXT = 8, 32

# Sizes that a config may give, with the tiny ones in their place. Fields that are null or 0 stay as they are.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), D_HEAD),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), D_MLP),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), D_MLP),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), CONTEXT),
    **dict.fromkeys(("original_max_position_embeddings", "initial_context_length"), TRAINED_CONTEXT),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    "rotary_dim": D_HEAD // 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "max_window_layers": LAYERS // 2,
    "first_k_dense_replace": 1,
}
# Numbers of groups of experts, where a config has more than one group.
_GROUPS = {"n_group": 2, "topk_group": 1}
# Fields of parts, or lists of such.
_NESTED = ("rope_scaling", "rope_parameters", "text_config", "attn_config", "ffn_config", "llm_config")
_PER_LAYER = ("layer_types", "attn_type_list", "mlp_layer_types", "no_rope_layers", "layers_block_type")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


def shrunk(config: HFConfig) -> HFConfig:
    """Return a config of the same architecture with tiny sizes; every field that is no size is kept."""
    small = {name: _shrink(name, value) for name, value in config.items()}
    for name in ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num"):
        if isinstance(config.get(name), int):
            small[name] = _kv_heads(config[name], _heads(config))
    scaling = small.get("rope_scaling")
    if isinstance(scaling, dict):
        pairs = int(D_HEAD * (config.get("partial_rotary_factor") or 1)) // 2
        small["rope_scaling"] = {key: _factors(value, pairs) for key, value in scaling.items()}
    return small


def _factors(value: FieldValue, pairs: int) -> FieldValue:
    """Of a list of one divisor per rotated pair, as many as a small head has; anything else as it is."""
    return value[:: max(1, len(value) // pairs)][:pairs] if isinstance(value, list) and len(value) > pairs else value


def _shrink(name: str, value: FieldValue) -> FieldValue:
    if name in _NESTED and isinstance(value, dict):
        return shrunk(value)
    if name in _PER_LAYER and isinstance(value, list):
        return _a_few(value)
    if name in _TOKENS and isinstance(value, int):
        return min(value, VOCABULARY - 1)
    if name in _GROUPS and isinstance(value, int) and value > 1:
        return _GROUPS[name]
    if name in _SIZES and isinstance(value, int) and value > 0:
        return _SIZES[name]
    return value


def _heads(config: HFConfig) -> int:
    return next((config[name] for name in ("num_attention_heads", "n_head", "n_heads") if config.get(name)), HEADS)


def _kv_heads(kv_heads: int, heads: int) -> int:
    """As many key-value heads as heads, one, or half: what the large model has."""
    return HEADS if kv_heads >= heads else 1 if kv_heads == 1 else HEADS // 2


def _a_few(per_layer: list[FieldValue]) -> list[FieldValue]:
    """One entry per layer: of each kind in turn, so that a rare kind is among them."""
    kinds: list[FieldValue] = []
    for entry in per_layer:
        if entry not in kinds:
            kinds.append(entry)
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)] if kinds else []
