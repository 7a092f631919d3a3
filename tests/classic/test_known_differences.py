"""What this library does where it differs from the classic one on purpose, beside what was there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.classic.outcomes import HERE, classic_shapes, here, stored, there
from tests.classic.rules import numbers, parameter, tokens
from tests.classic.rules import state as state_of


def model_of(config: str) -> Any:
    return HERE.model(config, classic_shapes(config))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=2e-5, rtol=1e-5)


def tensors(outcome: dict[str, Any], pattern: str) -> dict[str, Any]:
    """Return the part of an outcome whose paths fit a pattern."""
    return {path: value for path, value in outcome.items() if re.fullmatch(pattern, path)}


# The forward pass


def test_a_gated_mlp_adds_its_bias_before_the_product() -> None:
    model = model_of("gated")
    mlp = model.blocks[0].mlp
    mlp.b_in.data = parameter("b_in", (12,))
    _, cache = model.run_with_cache(tokens(1, 4))
    given = cache["normalized", 0, "ln2"] * model.blocks[0].ln2.w + model.blocks[0].ln2.b
    gate = torch.nn.functional.silu(given @ mlp.W_gate)
    assert close(cache["mlp_post", 0], gate * (given @ mlp.W_in + mlp.b_in))
    assert not close(cache["mlp_post", 0], gate * (given @ mlp.W_in) + mlp.b_in)


@pytest.mark.parametrize(("config", "last"), [("soft_caps", 2.0), ("gemma", 3.0)])
def test_hook_out_of_the_unembedding_is_what_the_model_returns(config: str, last: float) -> None:
    ours, theirs = (run(f"models/activations[{config}]")["values/unembed.hook_out"] for run in (here, there))
    assert close(ours, last * torch.tanh(theirs / last))
    assert close(ours[:, -1], model_of(config)(tokens(2, 5))[:, -1])


@pytest.mark.parametrize("layer", [0, 1])
def test_queries_and_keys_are_hooked_after_their_norm(layer: int) -> None:
    ours, theirs = here("models/activations[qk_norm]"), there("models/activations[qk_norm]")
    for one in "qk":
        name, shape = f"values/blocks.{layer}.attn.hook_{one}", classic_shapes("qk_norm")
        gain = parameter(f"blocks.{layer}.attn.{one}_norm.w", tuple(shape[f"blocks.{layer}.attn.{one}_norm.w"]))
        raw = theirs[name]
        scale = (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert close(ours[name], raw / scale * gain)
        assert close(
            ours[f"values/blocks.{layer}.attn.hook_rot_{one}"], theirs[f"values/blocks.{layer}.attn.hook_rot_{one}"]
        )


def test_queries_keys_and_values_are_hooked_after_the_clip() -> None:
    ours, theirs = here("models/activations[clipped]"), there("models/activations[clipped]")
    for path, value in tensors(theirs, r"values/.*\.hook_[qkv]").items():
        assert close(ours[path], value.clamp(-0.8, 0.8))
        assert not close(ours[path], value)


@pytest.mark.parametrize("config", ["alibi", "local", "embedding_norm", "gemma", "bidirectional", "plain"])
def test_a_masked_token_is_as_if_it_were_left_out(config: str) -> None:
    model, given = model_of(config), tokens(1, 5)
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    alone = model(given[mask.bool()][None])
    assert close(model(given, attention_mask=mask)[mask.bool()][None], alone)


def test_a_masked_token_is_left_out_of_bidirectional_attention_called_by_hand() -> None:
    attn, stream = model_of("bidirectional").blocks[1].attn, numbers("stream", (1, 5, 8))
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    left = stream[mask.bool()][None]
    masked = attn(query_input=stream, key_input=stream, value_input=stream, attention_mask=mask)
    assert close(masked[mask.bool()][None], attn(left, left, left))
    assert not close(masked, attn(stream, stream, stream))


def test_the_gradient_of_a_norm_is_the_sum_over_queries_keys_and_values() -> None:
    model = model_of("plain")
    _, cache = model.run_with_cache(tokens(1, 4), return_type="loss", incl_bwd=True)
    added = torch.zeros(1, 4, 8, requires_grad=True)
    name = "blocks.1.ln1.hook_normalized"
    model.run_with_hooks(tokens(1, 4), return_type="loss", fwd_hooks=[(name, lambda x, hook: x + added)]).backward()
    assert added.grad is not None
    assert close(cache[f"{name}_grad"], added.grad)


def test_padding_has_no_part_in_the_loss_of_texts() -> None:
    for config in ("text_plain", "text_rotary"):
        ours, theirs = (run(f"text/padding_and_losses[{config}]") for run in (here, there))
        assert close(ours["loss of padded texts"], theirs["loss under a mask"])


def test_routing_keeps_the_axes_of_prompts() -> None:
    theirs = there("models/activations[experts]")
    names = [f"blocks.{layer}.mlp.hook_expert_{kind}" for layer in (0, 1) for kind in ("weights", "indices")]
    _, cache = model_of("experts").run_with_cache(tokens(2, 5), names_filter=names)
    for name in names:
        assert cache[name].shape[:2] == (2, 5)
        assert close(cache[name].flatten(0, 1).float(), theirs[f"values/{name}"].float())


def test_a_gradient_reaches_a_gates_bias() -> None:
    found = here("models/weight_gradients[gated]")
    assert all(found[f"gradients/blocks.{layer}.mlp.b_gate"].any() for layer in (0, 1))


# Names


def test_hook_points_that_nothing_calls_are_unknown() -> None:
    for config, name in {"alibi": "hook_pos_embed", "attn_only": "blocks.0.hook_mlp_out"}.items():
        assert name not in model_of(config).hook_dict
        with pytest.raises(KeyError, match=re.escape(name)):
            model_of(config).add_hook(name, lambda x, hook: x)


def test_experts_have_biases_of_zero_where_a_classic_state_dict_has_none() -> None:
    model = model_of("experts")
    biases = {
        name: value for name, value in model.named_parameters() if re.search(r"mlp\.b_(in|out|gate|router)", name)
    }
    assert len(biases) == 8
    assert not any(value.any() for value in biases.values())


@pytest.mark.parametrize("name", [("normalized", "ln_f"), ("logits", 1)])
def test_a_short_name_of_nothing_raises(name: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, KeyError), match=str(name[0])):
        HERE.utils.get_act_name(*name)


def test_a_text_of_no_tokens_raises() -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        model_of("text_plain").to_tokens("", prepend_bos=False)


def test_indices_from_the_end_are_counted_from_the_start() -> None:
    assert HERE.utils.Slice(-1).indices(6).tolist() == [5]


@pytest.mark.parametrize("config", ["grouped", "llama", "ungrouped", "gemma"])
def test_n_params_counts_the_keys_and_values_that_exist(config: str) -> None:
    model = model_of(config)
    weights = [value for name, value in model.named_parameters() if re.search(r"\.W_(Q|K|V|O|in|out|gate)$", name)]
    assert model.cfg.n_params == sum(value.numel() for value in weights)


def test_the_scale_of_attention_is_the_number_that_scores_are_divided_by() -> None:
    assert model_of("no_scale").cfg.attn_scale == 1.0
    assert there("properties/config_values[no_scale]")["attn_scale"] == -1.0


# What was saved there


SAVED = ("plain", "rotary", "grouped", "attn_only", "experts", "shortformer", "gemma", "no_scale", "solu_ln", "clipped")


@pytest.mark.parametrize("config", SAVED)
def test_a_saved_config_and_state_dict_are_read(config: str) -> None:
    stored_there = stored("uses")[f"uses/saved_configs[{config}]"]
    fields = json.loads(str(stored_there["config"]))
    model = HERE.HookedTransformer(HERE.HookedTransformerConfig.from_dict({**fields, "dtype": torch.float32}))
    assert model.cfg.n_layers == fields["n_layers"]
    shapes = {
        path.removeprefix("state/"): json.loads(str(shape)) for path, shape in tensors(stored_there, "state/.*").items()
    }
    buffers = [name for name in shapes if name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos"))]
    assert buffers
    state = state_of({name: shape for name, shape in shapes.items() if name not in buffers}, model.cfg.gated_mlp)
    state |= {name: torch.zeros(shapes[name]) for name in buffers}
    model.load_state_dict(state)
    assert close(model(tokens(2, 5)), stored_there["logits"])


# Processing keeps what the model computes


@pytest.mark.parametrize("config", ["gated", "final_rms", "shortformer", "soft_caps"])
def test_processing_keeps_the_log_probabilities(config: str) -> None:
    model, given = model_of(config), tokens(2, 5)
    other = fresh(model)
    other.load_and_process_state_dict(model.state_dict())
    assert close(other(given).log_softmax(-1), model(given).log_softmax(-1))


def test_a_step_that_would_change_the_log_probabilities_is_left_out_with_a_warning() -> None:
    model, given = model_of("soft_caps"), tokens(2, 5)
    other = fresh(model)
    with pytest.warns(UserWarning, match="center_unembed"):
        other.load_and_process_state_dict(model.state_dict(), fold_ln=False, center_unembed=True)
    assert close(other(given).log_softmax(-1), model(given).log_softmax(-1))


def fresh(model: Any) -> Any:
    """Return a model of the same config with other weights."""
    return HERE.HookedTransformer(HERE.HookedTransformerConfig.from_dict({**model.cfg.to_dict(), "seed": 3}))


# Caches


@pytest.mark.parametrize("config", ["plain", "rms"])
def test_partial_sums_are_normed_with_statistics_of_their_own_at_every_layer(config: str) -> None:
    model = model_of(config)
    cache = model.run_with_cache(tokens(2, 4))[1]
    assert close(cache.accumulated_resid(1, apply_ln=True), model.blocks[1].ln1(cache.accumulated_resid(1)))
    to_mlp = cache.accumulated_resid(1, mlp_input=True)
    assert close(cache.accumulated_resid(1, mlp_input=True, apply_ln=True), model.blocks[1].ln2(to_mlp))


@pytest.mark.parametrize("config", ["plain", "attn_only", "rms", "parallel", "grouped", "llama", "both_sides"])
def test_gains_of_norms_act_on_the_parts_of_a_stream(config: str) -> None:
    name, gain = f"caches/decomposed[{config}]", parameter("ln_final.w", (8,))
    ours, theirs = here(name)["normed"], there(name)["normed"]
    assert close(ours, theirs * gain)


@pytest.mark.parametrize("config", ["plain", "rms"])
def test_gains_act_in_every_norm_and_in_attributions(config: str) -> None:
    ours, theirs = (run(f"caches/normed_stacks[{config}]") for run in (here, there))
    gains = {
        "final": "ln_final.w",
        "last": "ln_final.w",
        "for layer 1": "blocks.1.ln1.w",
        "for an MLP": "blocks.0.ln2.w",
    }
    for path, name in gains.items():
        assert close(ours[path], theirs[path] * parameter(name, (8,)))
    model = model_of(config)
    _, cache = model.run_with_cache(tokens(2, 4))
    whole = cache.accumulated_resid()[-1:]
    bias = model.ln_final.b @ model.W_U if config == "plain" else 0.0
    logits = cache.logit_attrs(whole, 3) + (bias + model.b_U)[3]
    assert close(logits[0], model(tokens(2, 4))[..., 3])


def test_the_remainder_of_no_heads_is_what_enters_layer_0() -> None:
    model = model_of("plain")
    _, cache = model.run_with_cache(tokens(2, 4))
    assert close(cache.stack_head_results(0, incl_remainder=True)[0], cache["resid_pre", 0])


def test_positions_that_never_enter_the_stream_are_no_part_of_it() -> None:
    model = model_of("shortformer")
    _, cache = model.run_with_cache(tokens(2, 4))
    stack, labels = cache.decompose_resid(return_labels=True)
    assert "pos_embed" not in labels
    assert close(stack.sum(0), cache["resid_post", -1])


def test_heads_that_do_not_add_up_are_refused() -> None:
    _, cache = model_of("both_sides").run_with_cache(tokens(1, 4))
    with pytest.raises(ValueError, match="does not split"):
        cache.stack_head_results()


# Matrices, patching, heads


@pytest.mark.parametrize("leading", ["()", "(2,)", "(2, 2)"])
def test_vh_is_v_transposed(leading: str) -> None:
    ours, theirs = here("matrices/singular_values"), there("matrices/singular_values")
    assert close(ours[f"{leading} Vh"].mT, theirs[f"{leading} Vh"])


def test_products_keep_the_inner_dimension() -> None:
    matrix = HERE.FactoredMatrix(torch.randn(5, 3), torch.randn(3, 4))
    assert (matrix @ torch.randn(4, 6)).mdim == 3


@pytest.mark.parametrize("config", ["plain", "attn_only", "grouped", "bidirectional"])
def test_grids_of_patterns_by_position_have_the_axes_of_the_others(config: str) -> None:
    name = f"patching/patterns[{config}]"
    assert close(here(name)["by_pos"], there(name)["by_pos"].mT)


@pytest.mark.parametrize("scenario", ["heads_by_position", "heads_at_all_positions"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_grids_of_ungrouped_keys_and_values_have_every_query_head(scenario: str, which: str) -> None:
    """There they stop after as many heads as there are key-value heads, 2 of 4."""
    ours, theirs = (run(f"patching/{scenario}[ungrouped]")[which] for run in (here, there))
    assert (ours.shape[-1], theirs.shape[-1]) == (4, 2)
    assert close(ours[..., :2], theirs)
    assert bool((ours[..., 2:] != 0).any())


def test_scores_of_heads_are_not_rounded() -> None:
    for config in ("text_plain", "text_rotary", "text_attn_only"):
        ours, theirs = (run(f"tools/detected_heads[{config}]") for run in (here, there))
        for path, value in tensors(theirs, ".*abs").items():
            assert torch.allclose(ours[path], value, atol=5.1e-4)
            assert not torch.allclose(ours[path], value, atol=1e-5)
