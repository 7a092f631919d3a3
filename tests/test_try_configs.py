"""The script that tries published configs, on a few of them: their fields are those of files that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import try_configs
from scripts.shrinking import LAYERS, shrunk
from scripts.try_configs import report, try_config, try_file

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "_name_or_path": "/opt/checkpoints/Llama-3.1-70B-Instruct/",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SANTACODER: dict[str, Any] = {
    "architectures": ["GPTBigCodeForCausalLM"],
    "model_type": "gpt_bigcode",
    "activation_function": "gelu_pytorch_tanh",
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 49152,
    "eos_token_id": 49152,
    "inference_runner": 0,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "max_sequence_length": None,
    "multi_query": True,
    "n_embd": 2048,
    "n_head": 16,
    "n_inner": 8192,
    "n_layer": 24,
    "n_positions": 2048,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "runner_max_sequence_length": None,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_type": "cls_index",
    "validate_runner_input": True,
    "vocab_size": 49280,
}
PHI_4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "attention_bias": False,
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1 + 0.9 * pair for pair in range(48)],
        "short_factor": [1.0 + 0.01 * pair for pair in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Frameworks write their own settings into the config.
SETTINGS: dict[str, Any] = {
    "sequence_parallel_enabled": False,
    "selective_checkpoint_enabled": False,
    "context_window_size": 2048,
    "attn_implementation": "flash_attention_2",
    "_flash_attn_2_enabled": True,
    "neftune_noise_alpha": 5.0,
    "model_max_length": 4096,
    "pad_token": "<pad>",
    "text_config": None,
    "custom_pipelines": {},
    "internal_version": "7",
    "add_cross_attention": False,
}

EQUAL = {
    "llama": (LLAMA, ""),
    "llama with settings": ({**LLAMA, **SETTINGS}, "'sequence_parallel_enabled': False"),
    "llama without architectures": ({**LLAMA, "architectures": None}, ""),
    "santacoder": (SANTACODER, "runner_max_sequence_length"),
    "phi-4-mini": (PHI_4_MINI, ""),
    "qwen3 moe": (QWEN3_MOE, ""),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_published_config_gives_equal_logits(name: str, tmp_path: Path) -> None:
    config, warned = EQUAL[name]
    outcome = try_config(config, tmp_path)
    assert outcome.kind == "equal", outcome
    assert len(outcome.warned) == bool(warned)
    assert not warned or warned in outcome.warned[0]


OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a field with an effect": ({**LLAMA, "is_causal": False}, "refused", "ignore_config_fields=['is_causal']"),
    "a model type of nobody": ({**LLAMA, "model_type": "lama"}, "refused", "does not know the model_type 'lama'"),
    "code of its own": (
        {**PHI_4_MINI, "model_type": "phi-msft"},
        "refused",
        "names code of its own to read it (auto_map)",
    ),
    "an encoder": ({"architectures": ["BertModel"], "model_type": "bert"}, "not supported", "BERT and other encoders"),
    "no reference": ({**LLAMA, "hidden_act": "swosh"}, "no reference", "swosh"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_config_has_an_outcome_with_a_reason(name: str, tmp_path: Path) -> None:
    config, kind, reason = OTHERS[name]
    outcome = try_config(config, tmp_path)
    assert outcome.kind == kind
    assert reason in outcome.reason


def test_other_logits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_configs, "TOLERANCE", 0.0)
    assert try_config(LLAMA, tmp_path).kind == "different"


def test_a_shrunk_config_keeps_what_is_no_size() -> None:
    small = shrunk({**QWEN3_MOE, "num_key_value_heads": 32, "layer_types": ["a"] * 5 + ["b"] + ["a"] * 42})
    assert small.keys() == {*QWEN3_MOE, "layer_types"}
    assert small["layer_types"] == ["a", "b", "a", "b"]
    assert small["num_hidden_layers"] == LAYERS
    assert small["num_key_value_heads"] == small["num_attention_heads"]
    assert small["shared_expert_intermediate_size"] == 0
    assert (small["rope_theta"], small["norm_topk_prob"]) == (1000000.0, True)
    assert shrunk({**LLAMA, "num_key_value_heads": 1})["num_key_value_heads"] == 1


def test_the_report_counts_by_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"source": name, "config": config} for name, (config, *_) in {**OTHERS, "good": EQUAL["llama"]}.items()]
    (tmp_path / "configs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts = report(try_file(tmp_path / "configs.jsonl"))
    assert counts == {"refused": 3, "not supported": 1, "no reference": 1, "equal": 1}
    printed = capsys.readouterr().out
    assert "refused: LlamaForCausalLM (a field with an effect): the Llama config" in printed
    assert "   3 refused\n   1 not supported\n   1 no reference\n" in printed
