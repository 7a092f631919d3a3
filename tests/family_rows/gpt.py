"""GPT-NeoX in English and Japanese, GPT-Neo, GPT-J, CodeGen, GPT-BigCode, the first GPT, OPT and BioGPT."""

from __future__ import annotations

from typing import Any

from tests.family_rows.row import Row

NEOX: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}

NEOX_JAPANESE: dict[str, Any] = {name: value for name, value in NEOX.items() if name != "intermediate_size"}

NEO: dict[str, Any] = {
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 32,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 4,
}

# The fields of GPT-J, CodeGen, GPT-BigCode and the first GPT have these names.
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}

OPT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 32,
}

BIOGPT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}

# What OPT with norms on the stream is without them there: both have none at the end.
NORMS_BEFORE = {"do_layer_norm_before": True, "_remove_final_layer_norm": True}

ROWS = (
    Row(
        "gpt-neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        NEOX,
        features={
            "parallel": {"use_parallel_residual": False},
            "partly-rotary": {"rope_parameters": {**NEOX["rope_parameters"], "partial_rotary_factor": 1.0}},
        },
    ),
    Row(
        "gpt-neox-sequential-linear-tied",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {**NEOX["rope_parameters"], "rope_type": "linear", "factor": 3.0},
            "tie_word_embeddings": True,
        },
        features={
            "sequential": {"use_parallel_residual": True},
            "scaling": {"rope_parameters": NEOX["rope_parameters"]},
        },
    ),
    Row(
        "gpt-neox-japanese",
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        NEOX_JAPANESE,
        float64=True,
        features={"partly-rotary": {"rope_parameters": {**NEOX["rope_parameters"], "partial_rotary_factor": 1.0}}},
    ),
    Row(
        "gpt-neox-japanese-relu-linear-untied",
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        {
            **NEOX_JAPANESE,
            "hidden_act": "relu",
            "intermediate_multiple_size": 2,
            "rope_parameters": {**NEOX["rope_parameters"], "rope_type": "linear", "factor": 3.0},
            "tie_word_embeddings": False,
        },
        float64=True,
        features={"activation": {"hidden_act": "gelu"}, "scaling": {"rope_parameters": NEOX["rope_parameters"]}},
    ),
    Row(
        "gpt-neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        NEO,
        features={
            "window": {"window_size": 5},
            "layers": {"attention_types": [[["local", "global"], 2]]},
        },
    ),
    Row(
        "gpt-neo-global-untied",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **NEO,
            "attention_types": [[["global"], 4]],
            "intermediate_size": 40,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
        features={"layers": {"attention_types": [[["local"], 4]]}},
    ),
    Row(
        "gptj",
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT, "rotary_dim": 4},
        features={"partly-rotary": {"rotary_dim": 8}},
    ),
    Row(
        "gptj-all-rotary-tied",
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT, "rotary_dim": 8, "n_inner": 40, "tie_word_embeddings": True},
        features={"all-rotary": {"rotary_dim": 4}},
    ),
    # Two heads on each of four cores: their order matters.
    Row(
        "codegen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "n_head": 8, "rotary_dim": 2},
        features={"partly-rotary": {"rotary_dim": 4}},
    ),
    Row(
        "codegen-tied",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 8, "n_inner": 40, "tie_word_embeddings": True},
        features={"all-rotary": {"rotary_dim": 4}},
    ),
    Row(
        "gpt-bigcode",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        GPT,
    ),
    Row(
        "gpt-bigcode-multi-head-untied",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {**GPT, "multi_query": False, "scale_attn_weights": False, "n_inner": 40, "tie_word_embeddings": False},
        features={"no-scale": {"scale_attn_weights": True}},
    ),
    Row(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        GPT,
        float64=True,
        features={"activation": {"afn": "relu"}},
    ),
    Row(
        "openai-gpt-swish-untied",
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        {**GPT, "afn": "swish", "tie_word_embeddings": False},
        float64=True,
        features={"activation": {"afn": "gelu"}},
    ),
    Row("opt", "OPTForCausalLM", "OPTConfig", OPT, features={"activation": {"activation_function": "gelu"}}),
    Row(
        "opt-norms-on-the-stream-projected",
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        invertible=False,
        features={"norms": NORMS_BEFORE},
    ),
    Row(
        "opt-projected-untied",
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "word_embed_proj_dim": 16, "tie_word_embeddings": False},
        invertible=False,
    ),
    Row(
        "opt-no-biases-no-gains-untied",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    Row(
        "opt-no-final-norm",
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "_remove_final_layer_norm": True},
        features={"norms": {"do_layer_norm_before": False}},
    ),
    Row(
        "biogpt",
        "BioGptForCausalLM",
        "BioGptConfig",
        BIOGPT,
        float64=True,
        features={"embedding-scale": {"scale_embedding": False}},
    ),
    Row(
        "biogpt-relu-unscaled-untied",
        "BioGptForCausalLM",
        "BioGptConfig",
        {**BIOGPT, "hidden_act": "relu", "scale_embedding": False, "tie_word_embeddings": False},
        float64=True,
        features={"activation": {"hidden_act": "gelu"}},
    ),
)
