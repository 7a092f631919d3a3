"""Other relatives of Llama, from Cohere, Granite and GLM to nanochat, and the decoders of ModernBERT."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
LINEAR: dict[str, Any] = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
PARTLY: dict[str, Any] = {**ROTARY, "partial_rotary_factor": 0.5}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 8,
}
# What published Hunyuan configs hold; `alpha` alone counts.
ALPHA: dict[str, Any] = {
    "rope_type": "dynamic",
    "rope_theta": 100.0,
    "alpha": 50.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "rope_parameters": ROTARY,
    "tie_word_embeddings": False,
}
# Heads that together are wider than the stream.
WIDE: dict[str, Any] = {**COMMON, "head_dim": 8}

UNSCALED: dict[str, dict[str, Any]] = {"scaling": {"rope_parameters": ROTARY}}
WHOLLY: dict[str, dict[str, Any]] = {"partly": {"rope_parameters": {**PARTLY, "partial_rotary_factor": 1.0}}}

GRANITE: dict[str, Any] = {
    **WIDE,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 4.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.4,
}

WINDOWS: dict[str, Any] = {**COMMON, "num_hidden_layers": 4, "sliding_window": 4}
GLOBAL_FIRST = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

MODERNBERT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "local_attention": 10,
    "pad_token_id": 2,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}

ROWS = (
    Row(
        "cohere",
        "CohereForCausalLM",
        "CohereConfig",
        {**COMMON, "logit_scale": 0.4, "tie_word_embeddings": True},
        features={"logit-scale": {"logit_scale": 1.0}},
    ),
    Row(
        "cohere-qk-norm-biases-untied",
        "CohereForCausalLM",
        "CohereConfig",
        {**WIDE, "use_qk_norm": True, "attention_bias": True, "rope_parameters": LINEAR},
        features={"qk-norm": {"use_qk_norm": False}, **UNSCALED},
    ),
    Row(
        "cohere2",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {**WINDOWS, "logit_scale": 0.4, "tie_word_embeddings": True},
        features={
            "window": {"sliding_window": 40},
            "last-layer": {"layer_types": ["sliding_attention"] * 4},
            "logit-scale": {"logit_scale": 1.0},
        },
    ),
    Row(
        "cohere2-global-first-biases-untied",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {**WINDOWS, "layer_types": GLOBAL_FIRST, "attention_bias": True},
        features={"order": {"layer_types": GLOBAL_FIRST[1:] + GLOBAL_FIRST[:1]}},
    ),
    Row(
        "granite",
        "GraniteForCausalLM",
        "GraniteConfig",
        GRANITE,
        features={
            "attention-multiplier": {"attention_multiplier": 1.0},
            "embedding-multiplier": {"embedding_multiplier": 1.0},
            "logits-scaling": {"logits_scaling": 1.0},
            "residual-multiplier": {"residual_multiplier": 1.0},
        },
    ),
    Row(
        "granite-biases-tied",
        "GraniteForCausalLM",
        "GraniteConfig",
        {**GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        features={"residual-multiplier": {"residual_multiplier": 1.0}},
    ),
    Row("glm", "GlmForCausalLM", "GlmConfig", {**WIDE, "rope_parameters": PARTLY}, features=WHOLLY),
    Row(
        "glm-no-biases-tied",
        "GlmForCausalLM",
        "GlmConfig",
        {
            **WIDE,
            "attention_bias": False,
            "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": True,
        },
        features={"wholly": {"rope_parameters": PARTLY}},
    ),
    Row("glm4", "Glm4ForCausalLM", "Glm4Config", {**WIDE, "rope_parameters": PARTLY}, features=WHOLLY),
    Row(
        "glm4-no-biases-tied",
        "Glm4ForCausalLM",
        "Glm4Config",
        {**WIDE, "attention_bias": False, "rope_parameters": PARTLY, "tie_word_embeddings": True},
    ),
    Row("helium", "HeliumForCausalLM", "HeliumConfig", {**COMMON, "hidden_size": 32, "head_dim": 8}),
    Row(
        "helium-biases-tied",
        "HeliumForCausalLM",
        "HeliumConfig",
        {
            **COMMON,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        features=UNSCALED,
    ),
    Row(
        "nemotron",
        "NemotronForCausalLM",
        "NemotronConfig",
        {**WIDE, "rope_parameters": PARTLY},
        features={**WHOLLY, "activation": {"hidden_act": "relu"}},
    ),
    Row(
        "nemotron-biases-tied",
        "NemotronForCausalLM",
        "NemotronConfig",
        {
            **COMMON,
            "hidden_size": 32,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": PARTLY,
            "tie_word_embeddings": True,
        },
        features=WHOLLY,
    ),
    Row("arcee", "ArceeForCausalLM", "ArceeConfig", WIDE, features={"activation": {"hidden_act": "relu"}}),
    Row(
        "arcee-yarn-biases-tied",
        "ArceeForCausalLM",
        "ArceeConfig",
        {
            **WIDE,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {**YARN, "mscale": 1.0},
            "tie_word_embeddings": True,
        },
        pos=24,
        features=UNSCALED,
    ),
    Row("seed-oss", "SeedOssForCausalLM", "SeedOssConfig", WIDE),
    Row(
        "seed-oss-other-biases-tied",
        "SeedOssForCausalLM",
        "SeedOssConfig",
        {
            **WIDE,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Row(
        "apertus",
        "ApertusForCausalLM",
        "ApertusConfig",
        {**WIDE, "rope_parameters": LLAMA3},
        pos=24,
        features={"activation": {"hidden_act": "relu2"}, **UNSCALED},
    ),
    Row(
        "apertus-biases-tied",
        "ApertusForCausalLM",
        "ApertusConfig",
        {**COMMON, "attention_bias": True, "tie_word_embeddings": True},
    ),
    Row(
        "apertus-squared-relu",
        "ApertusForCausalLM",
        "ApertusConfig",
        {**COMMON, "hidden_act": "relu2"},
        features={"activation": {"hidden_act": "xielu"}},
    ),
    Row(
        "exaone4",
        "Exaone4ForCausalLM",
        "Exaone4Config",
        WINDOWS,
        features={
            "window": {"sliding_window": 40},
            "last-layer": {"layer_types": ["sliding_attention"] * 4},
            # Without a window anywhere, global layers rotate.
            "no-rotation": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
        },
    ),
    Row(
        "exaone4-all-global-still",
        "Exaone4ForCausalLM",
        "Exaone4Config",
        {**WINDOWS, "layer_types": ["full_attention"] * 4},
        features={"no-rotation": {"sliding_window": None}},
    ),
    Row(
        "exaone4-no-window-tied",
        "Exaone4ForCausalLM",
        "Exaone4Config",
        {
            **WIDE,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
        pos=24,
        features={**UNSCALED, "rotation": {"sliding_window": 40}},
    ),
    Row("ernie4.5", "Ernie4_5ForCausalLM", "Ernie4_5Config", {**WIDE, "tie_word_embeddings": True}),
    Row(
        "ernie4.5-biases-untied",
        "Ernie4_5ForCausalLM",
        "Ernie4_5Config",
        {**WIDE, "use_bias": True, "rope_parameters": LINEAR},
        features=UNSCALED,
    ),
    Row(
        "hunyuan-dense",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        {**WIDE, "rope_parameters": ALPHA},
        features={"alpha": {"rope_parameters": ROTARY}},
    ),
    Row(
        "hunyuan-dense-dynamic-biases-tied",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        {
            **WIDE,
            "max_position_embeddings": 8,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
            "tie_word_embeddings": True,
        },
        pos=20,
        features=UNSCALED,
    ),
    Row(
        "nanochat",
        "NanoChatForCausalLM",
        "NanoChatConfig",
        {**COMMON, "final_logit_softcapping": 2.0},
        features={"cap": {"final_logit_softcapping": None}, "activation": {"hidden_act": "relu"}},
    ),
    Row(
        "nanochat-no-cap-biases-tied",
        "NanoChatForCausalLM",
        "NanoChatConfig",
        {
            **WIDE,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        features=UNSCALED,
    ),
    Row(
        "modernbert-decoder",
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        MODERNBERT,
        features={
            "windows": {"local_attention": 40},
            "layer-types": {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "two-bases": {"rope_parameters": {**MODERNBERT["rope_parameters"], "sliding_attention": ROTARY}},
            "activation-of-the-head": {"classifier_activation": "relu"},
        },
    ),
    Row(
        "modernbert-decoder-biases-untied",
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        {
            **MODERNBERT,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "classifier_activation": "silu",
            "decoder_bias": False,
            "tie_word_embeddings": False,
        },
    ),
)
