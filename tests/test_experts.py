"""What the family table cannot say of mixtures of experts: the router's own numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from hooked_lm import HookedTransformer
from tests.family_rows import ROWS, Row
from tests.family_rows.experts import PHIMOE_LONGROPE
from tests.helpers import tiny_model, tiny_tokens
from weight_conversion import checkpoint
from weight_conversion.errors import CheckpointError
from weight_conversion.registry import family_of

DEEPSEEK_FILE: dict[str, Any] = {
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
}
MINIMAX_FILE: dict[str, Any] = {
    "attn_type_list": [1, 1, 1],
    "mtp_transformer_layers": 1,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rotary_dim": 4,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
}


def row_named(row_id: str) -> Row:
    return next(row for row in ROWS if row.id == row_id)


def routed(row: Row, folder: Path) -> tuple[HookedTransformer, Any, tuple[Tensor, ...]]:
    """Our model, its cache, and the reference's router logits [batch pos expert] of every layer that has experts."""
    theirs = row.build()
    theirs.save_pretrained(folder)
    ours = HookedTransformer.from_pretrained_no_processing(folder)
    tokens = row.tokens()
    logits = theirs(tokens, output_router_logits=True).router_logits
    return (
        ours,
        ours.run_with_cache(tokens, names_filter="*")[1],
        tuple(layer.unflatten(0, tokens.shape) for layer in logits),
    )


@pytest.mark.parametrize("row_id", ["mixtral", "qwen2-moe", "olmoe", "granite-moe", "gpt-oss"])
@torch.no_grad()
def test_expert_weights_are_the_softmax_of_the_reference_router(row_id: str, tmp_path: Path) -> None:
    ours, cache, logits = routed(row_named(row_id), tmp_path)
    assert len(logits) == ours.cfg.n_layers
    for layer, scores in enumerate(logits):
        torch.testing.assert_close(cache[f"blocks.{layer}.mlp.hook_expert_weights"], scores.softmax(-1))
        chosen = scores.topk(ours.cfg.experts_per_token or 0).indices
        assert torch.equal(cache[f"blocks.{layer}.mlp.hook_expert_indices"], chosen)


@torch.no_grad()
def test_sparsemixer_weighs_only_the_two_best_experts(tmp_path: Path) -> None:
    _, cache, logits = routed(row_named("phimoe"), tmp_path)
    for layer, scores in enumerate(logits):
        weights = cache[f"blocks.{layer}.mlp.hook_expert_weights"]
        assert ((weights > 0).sum(-1) == 2).all()
        assert torch.equal(weights > 0, torch.zeros_like(weights).scatter(-1, scores.topk(2).indices, 1.0) > 0)


@torch.no_grad()
def test_dense_layers_among_experts_are_gated_mlps(tmp_path: Path) -> None:
    ours, cache, logits = routed(row_named("qwen3-moe"), tmp_path)
    assert ours.cfg.moe_layers == [True, False, True]
    assert len(logits) == 2
    assert "blocks.1.mlp.hook_expert_weights" not in cache
    assert cache["blocks.1.mlp.hook_post"].shape[-1] == 40


def fields_of(row_id: str, **changes: Any) -> dict[str, Any]:
    return {**row_named(row_id).hf_config().to_dict(), **changes}


@pytest.mark.parametrize(
    ("row_id", "changes", "message"),
    [
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\).*dequantize=True"),
        ("gpt-oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported"),
        ("phimoe", {"num_experts_per_tok": 3}, "SparseMixer picks two experts"),
        ("phimoe", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ("phimoe", {"rope_parameters": {**PHIMOE_LONGROPE, "long_mscale": 2.0}}, "only equal ones are"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        ("minimax-m2", {"attn_type_list": [1, 0, 1]}, r"attn_type_list=\[1, 0, 1\] is not supported"),
        ("exaone-moe", {"mlp_layer_types": ["dense", "other"]}, r"MLPs of type \['other'\] is not supported"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 is not supported"),
    ],
)
def test_what_no_rule_can_express_is_refused(row_id: str, changes: dict[str, Any], message: str) -> None:
    architecture = row_named(row_id).architecture
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_family(family_of(architecture), fields_of(row_id, **changes), architecture)


def test_fields_that_only_published_files_have_are_known() -> None:
    published: dict[str, dict[str, Any]] = {
        "gpt-oss": {"experts_per_token": 2, "initial_context_length": 8, "rope_theta": 100.0, "rope_scaling": None},
        "qwen3-moe": {"num_experts": 5, "max_window_layers": 3, "qkv_bias": False, "use_qk_norm": True},
        "phimoe": {"original_max_position_embeddings": 16, "rope_scaling": None},
        "deepseek-v3": {**DEEPSEEK_FILE, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        "deepseek-v2": {**DEEPSEEK_FILE, "scoring_func": "softmax"},
        "glm4-moe": {"num_nextn_predict_layers": 1, "rope_scaling": None},
        "minimax-m2": MINIMAX_FILE,
    }
    for row_id, extra in published.items():
        architecture = row_named(row_id).architecture
        family = family_of(architecture)
        cfg, _ = checkpoint.read_family(family, fields_of(row_id, **extra), architecture)
        assert cfg == checkpoint.read_family(family, fields_of(row_id), architecture)[0], row_id


@torch.no_grad()
def test_a_quantised_gpt_oss_loads_from_its_folder_and_from_memory_dequantised_by_transformers(tmp_path: Path) -> None:
    # Blocks of MXFP4 have 32 entries, so the widths are 32.
    row = row_named("gpt-oss")
    quantise(row.build(hidden_size=32, intermediate_size=32), tmp_path)
    read = HookedTransformer.from_pretrained_no_processing(tmp_path, dtype=torch.float32)
    theirs = GptOssForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    with pytest.warns(UserWarning, match="tokens only"):
        ours = HookedTransformer.from_pretrained_no_processing(str(tmp_path), hf_model=theirs)
    reference = theirs(row.tokens()).logits
    assert (ours(row.tokens()) - reference).abs().max() < 1e-4
    assert (read(row.tokens()) - reference).abs().max() < 1e-4


def quantise(model: GptOssForCausalLM, folder: Path) -> None:
    """Save a model with experts as the published checkpoints have them: random MXFP4 blocks and their scales."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, _, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (n_experts, out, 1, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.full((n_experts, out, 1), 124, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))


def test_zeroing_every_expert_s_weight_leaves_a_token_with_nothing_from_them() -> None:
    model = tiny_model(num_experts=4, experts_per_token=2, norm_topk_prob=True, gated_mlp=True, act_fn="silu")
    tokens = tiny_tokens()
    silent = [(f"blocks.{layer}.mlp.hook_expert_weights", lambda weights, hook: 0 * weights) for layer in range(2)]
    without_mlps = [(f"blocks.{layer}.hook_mlp_out", lambda out, hook: 0 * out) for layer in range(2)]
    logits = model.run_with_hooks(tokens, fwd_hooks=silent)
    assert torch.equal(logits, model.run_with_hooks(tokens, fwd_hooks=without_mlps))


def test_weights_that_a_hook_has_made_negative_are_rescaled_as_others_are() -> None:
    model = tiny_model(num_experts=2, experts_per_token=2, norm_topk_prob=True, gated_mlp=True, act_fn="silu")
    tokens, site = tiny_tokens(), "blocks.0.mlp.hook_expert_weights"
    negated = model.run_with_hooks(tokens, fwd_hooks=[(site, lambda weights, hook: -3 * weights)])
    torch.testing.assert_close(negated, model(tokens))


# The router with a corrected choice

CORRECTED = ["glm4-moe", "dots1", "solar-open", "minimax-m2", "ernie4.5-moe", "exaone-moe", "hy-v3"]


@pytest.mark.parametrize("row_id", CORRECTED)
@torch.no_grad()
def test_the_correction_changes_the_choice_of_experts_and_not_their_weights(row_id: str, tmp_path: Path) -> None:
    row = row_named(row_id)
    theirs, tokens = row.build(), row.tokens()
    theirs.save_pretrained(tmp_path)
    ours = HookedTransformer.from_pretrained_no_processing(tmp_path)
    logits, cache = ours.run_with_cache(tokens, names_filter="*")
    layer = max(layer for layer in range(ours.cfg.n_layers) if ours.cfg.has_experts(layer))
    weights, chosen = (cache[f"blocks.{layer}.mlp.hook_expert_{what}"] for what in ("weights", "indices"))
    largest = weights.topk(chosen.shape[-1]).indices
    assert (chosen.sort(-1).values != largest.sort(-1).values).any()
    for module in theirs.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.zero_()
    for block in ours.blocks:
        if hasattr(block.mlp, "b_correction"):
            block.mlp.b_correction.zero_()
    uncorrected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), uncorrected, atol=1e-4, rtol=1e-5)
    assert (logits - uncorrected).abs().max() > 1e-2


def corrected_model(dtype: torch.dtype) -> HookedTransformer:
    fields = {"num_experts": 4, "experts_per_token": 1, "router_scores": "sigmoid", "router_correction": True}
    return tiny_model(**fields, gated_mlp=True, act_fn="silu", dtype=dtype)


def test_the_correction_stays_in_float32_in_a_model_of_lower_precision() -> None:
    # Next to 8, bfloat16 has no numbers closer than 1/16.
    correction = torch.tensor([8.0, 8.01, 8.0, 7.99])
    model = corrected_model(torch.float32)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.b_correction.copy_(correction)
    parameter = model.blocks[0].mlp.b_correction
    for dtype in (torch.bfloat16, torch.float16):
        low = model.to(dtype)
        assert low.cfg.dtype == low.blocks[0].mlp.W_router.dtype == dtype
        assert torch.equal(low.state_dict()["blocks.0.mlp.b_correction"], correction)
        assert low.blocks[0].mlp.b_correction is parameter
        assert low(tiny_tokens()).isfinite().all()
    assert model.double().blocks[0].mlp.b_correction.dtype == torch.float64


def test_a_saved_model_of_low_precision_keeps_its_correction(tmp_path: Path) -> None:
    model = corrected_model(torch.bfloat16)
    with torch.no_grad():
        model.blocks[1].mlp.b_correction.copy_(torch.tensor([8.0, 8.01, 8.0, 7.99]))
    model.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert again.cfg.dtype == torch.bfloat16
    assert torch.equal(again.blocks[1].mlp.b_correction, model.blocks[1].mlp.b_correction)
    assert torch.equal(again(tiny_tokens()), model(tiny_tokens()))


def test_a_router_in_float32_sees_what_bfloat16_would_round_away() -> None:
    fields = {"num_experts": 4, "experts_per_token": 1, "gated_mlp": True, "act_fn": "silu", "dtype": torch.bfloat16}
    low, exact = tiny_model(**fields), tiny_model(**fields, router_in_float32=True)
    exact.load_state_dict(low.state_dict())
    site, seen, read = "blocks.0.mlp.hook_expert_weights", [], []
    for model in (low, exact):
        model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        seen.append(model.run_with_cache(tiny_tokens(), names_filter=site)[1][site])
    assert seen[0].dtype == seen[1].dtype == torch.float32
    mlp = exact.blocks[0].mlp
    scores = read[1].float() @ mlp.W_router.float() + mlp.b_router.float()
    torch.testing.assert_close(seen[1], scores.softmax(-1).detach())
    assert not torch.equal(seen[0], seen[1])


@torch.no_grad()
def test_an_edit_of_the_weights_changes_the_choice_under_correction_and_groups() -> None:
    groups = {"expert_groups": 2, "expert_groups_per_token": 1}
    model = tiny_model(
        num_experts=4, experts_per_token=2, router_scores="sigmoid", router_correction=True, act_fn="silu", **groups
    )
    site, seen = "blocks.0.mlp.hook_expert_", []
    model.run_with_hooks(
        tiny_tokens(),
        fwd_hooks=[
            (f"{site}weights", lambda weights, hook: weights + torch.tensor([0.0, 0.0, 9.0, 9.0])),
            (f"{site}indices", lambda indices, hook: seen.append(indices)),
        ],
    )
    assert set(seen[0].unique().tolist()) == {2, 3}


def test_layers_that_predict_later_tokens_are_left_unread(tmp_path: Path) -> None:
    row = row_named("glm4-moe")
    theirs = row.build()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(24, 48)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = HookedTransformer.from_pretrained_no_processing(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(row.tokens()), theirs(row.tokens()).logits, atol=1e-4, rtol=1e-5)
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(24, 48)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no rule accounts for: layers\.4\.eh_proj"):
        HookedTransformer.from_pretrained_no_processing(tmp_path)
