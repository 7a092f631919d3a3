"""Processing a state dict: the classic methods with an argument, `fill_missing_keys` and `ProcessWeights`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig
from hooked_lm.weight_processing import ProcessWeights
from hooked_lm.weights import STEPS
from tests.helpers import randomise_, tiny_config, tiny_tokens
from tests.weights_helpers import EXACT, KINDS, log_probabilities, model_of

Weights = dict[str, Tensor]

METHODS = {
    "fold_ln": "fold_layer_norm",
    "center_writing_weights": "center_writing_weights",
    "center_unembed": "center_unembed",
    "fold_value_biases": "fold_value_biases",
    "refactor_factored_attn_matrices": "refactor_factored_attn_matrices",
}
SAMPLE = ["layer norm", "rms", "gated rms", "grouped queries", "solu_ln", "tied, scaled", "experts", "final rms"]


def copied(weights: Weights) -> Weights:
    return {name: value.clone() for name, value in weights.items()}


def options_of(step: str) -> dict[str, bool | None]:
    """The options with which a step does to a state dict what it does to the model."""
    return {"center_weights": None} if step == "fold_ln" else {}


def assert_same(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=0, atol=1e-13), name


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["layer norm", "tied, scaled", "attention only"])
def test_a_state_dict_is_processed_and_the_model_and_the_given_one_stay(kind: str, step: str) -> None:
    model = model_of(kind)
    given, before = copied(dict(model.state_dict())), copied(dict(model.state_dict()))
    returned = getattr(model, METHODS[step])(given)
    assert returned is not given
    assert_same(given, before)
    assert_same(dict(model.state_dict()), before)
    assert model.processed == ()
    assert model.cfg.normalization_type == "LN"
    assert returned.keys() == before.keys()
    assert any(not torch.equal(returned[name], before[name]) for name in before)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", SAMPLE)
def test_a_processed_state_dict_has_the_weights_that_the_model_processed_in_place_has(kind: str, step: str) -> None:
    model = model_of(kind)
    if step == "refactor_factored_attn_matrices" and STEPS[step].obstacle(model.cfg) is not None:
        with pytest.raises(ValueError, match="refactor_factored_attn_matrices: "):
            model.refactor_factored_attn_matrices(model.state_dict())
        return
    returned: Weights = getattr(ProcessWeights, METHODS[step])(model.state_dict(), model.cfg, **options_of(step))
    model = copy.deepcopy(model)
    getattr(model, METHODS[step])()
    for name, value in model.state_dict().items():
        assert torch.allclose(returned[name], value, rtol=0, atol=1e-13), name
    for name in returned.keys() - model.state_dict().keys():
        assert torch.equal(returned[name], torch.full_like(returned[name], float(name.endswith(".w")))), name


@pytest.mark.parametrize("kind", ["layer norm", "solu_ln", "grouped queries", "tied, scaled"])
def test_the_classic_recipe_for_a_state_dict_keeps_the_log_probabilities(kind: str) -> None:
    model = model_of(kind)
    weights = model.center_writing_weights(model.state_dict())
    weights = model.center_unembed(weights)
    weights = model.fold_layer_norm(weights)
    weights = model.fold_value_biases(weights)
    processed = HookedTransformer(model.cfg)
    processed.load_state_dict(weights)
    assert (log_probabilities(processed) - log_probabilities(model)).abs().max().item() < EXACT
    assert processed.W_U.mean(-1).abs().max() < EXACT
    assert not processed.b_V.any()
    assert not torch.equal(processed.W_Q, model.W_Q)


def test_buffers_of_the_classic_library_are_left_out_and_its_names_translated() -> None:
    model = randomise_(HookedTransformer(tiny_config(n_heads=4, n_key_value_heads=2)))
    classic = copied(dict(model.state_dict()))
    for layer in range(model.cfg.n_layers):
        classic[f"blocks.{layer}.attn.mask"] = torch.ones(8, 8).bool()
        classic[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(float("-inf"))
        for name in ("W_K", "W_V", "b_K", "b_V"):
            classic[f"blocks.{layer}.attn._{name}"] = classic.pop(f"blocks.{layer}.attn.{name}")
    assert_same(model.fold_layer_norm(classic), model.fold_layer_norm(model.state_dict()))


@pytest.mark.parametrize("kind", ["LNPre", "RMSPre"])
def test_a_state_dict_with_gains_for_a_model_without_is_folded_and_loses_them(kind: str) -> None:
    unfolded = randomise_(HookedTransformer(tiny_config(normalization_type=kind.removesuffix("Pre"))))
    model = HookedTransformer(tiny_config(normalization_type=kind))
    model.load_state_dict(model.fold_layer_norm(unfolded.state_dict(), center_weights=kind == "LNPre"))
    assert (log_probabilities(model) - log_probabilities(unfolded)).abs().max().item() < EXACT


def test_the_biases_of_norms_can_be_left_where_they_are() -> None:
    model = model_of("layer norm")
    before = model.state_dict()
    folded = model.fold_layer_norm(before, fold_biases=False, center_weights=False)
    assert torch.equal(folded["blocks.0.ln1.b"], before["blocks.0.ln1.b"])
    assert torch.equal(folded["blocks.0.attn.b_Q"], before["blocks.0.attn.b_Q"])
    assert torch.equal(folded["blocks.0.ln1.w"], torch.ones_like(before["blocks.0.ln1.w"]))
    gain = before["blocks.0.ln1.w"]
    assert torch.allclose(folded["blocks.0.attn.W_Q"], gain[:, None] * before["blocks.0.attn.W_Q"])


def test_centring_after_a_norm_that_keeps_the_mean_warns() -> None:
    model = model_of("rms")
    with pytest.warns(UserWarning, match="pass center_weights=False") as caught:
        centred = model.fold_layer_norm(model.state_dict())
    assert caught[0].filename == __file__
    assert centred["blocks.1.attn.W_K"].mean(-2).abs().max() < EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.fold_layer_norm(model.state_dict(), True, False)["blocks.1.attn.W_K"].mean(-2).abs().max() > 1e-3


def test_options_for_a_state_dict_do_not_go_with_the_models_own_weights() -> None:
    model = model_of("layer norm")
    for options in ({"fold_biases": False}, {"center_weights": False}):
        with pytest.raises(ValueError, match="are for a state dict"):
            model.fold_layer_norm(None, **options)  # type: ignore[call-overload]


def test_a_bias_that_has_nowhere_to_go_raises_by_name() -> None:
    model = model_of("layer norm")
    weights = dict(model.state_dict())
    del weights["blocks.1.attn.b_K"]
    with pytest.raises(ValueError, match=r"into blocks\.1\.attn\.b_K, and the state dict has no such tensor"):
        model.fold_layer_norm(weights)


def test_a_rotary_head_is_not_rotated_in_a_state_dict_either() -> None:
    model = model_of("rotary")
    with pytest.raises(ValueError, match="rotary positions act on a head's dimensions"):
        model.refactor_factored_attn_matrices(model.state_dict())


# Missing tensors


def test_missing_biases_are_filled_with_zeros_in_silence_and_the_given_dict_stays() -> None:
    model = HookedTransformer(tiny_config())
    weights = {name: value for name, value in model.state_dict().items() if ".b_" not in name}
    n_given = len(weights)
    filled = model.fill_missing_keys(weights)
    assert filled.keys() == model.state_dict().keys()
    assert len(weights) == n_given
    assert not filled["blocks.0.attn.b_Q"].any()
    assert filled["blocks.0.attn.W_Q"] is weights["blocks.0.attn.W_Q"]


@pytest.mark.parametrize("name", ["blocks.0.ln1.w", "ln_final.b", "pos_embed.W_pos", "blocks.1.mlp.b_in"])
def test_what_is_filled_with_other_than_zeros_for_biases_is_named(name: str) -> None:
    model = model_of("layer norm")
    weights = dict(model.state_dict())
    kept = weights.pop(name)
    with pytest.warns(UserWarning, match=f"no {name}: filled with the model's present values"):
        assert torch.equal(model.fill_missing_keys(weights)[name], kept)


@pytest.mark.parametrize("name", ["blocks.0.attn.W_Q", "blocks.1.mlp.W_out", "blocks.1.attn.W_O"])
def test_a_missing_matrix_of_a_layer_raises(name: str) -> None:
    model = model_of("layer norm")
    weights = dict(model.state_dict())
    del weights[name]
    for fill in (model.fill_missing_keys, model.load_and_process_state_dict):
        with pytest.raises(ValueError, match=f"has no {name}"):
            fill(weights)


def test_a_tied_model_does_not_fill_in_its_own_unembedding() -> None:
    model = model_of("tied, scaled")
    weights = copied(dict(model.state_dict()))
    del weights["unembed.W_U"]
    weights["embed.W_E"] += 1
    assert model.fill_missing_keys(weights).keys() == weights.keys()


def test_loading_and_processing_fills_in_what_a_classic_file_leaves_out() -> None:
    model = HookedTransformer(tiny_config())
    source = randomise_(HookedTransformer(tiny_config()))
    with torch.no_grad():
        for block in source.blocks:
            block.attn.b_K.zero_()
    weights = {name: value for name, value in source.state_dict().items() if not name.endswith("attn.b_K")}
    model.load_and_process_state_dict(weights)
    assert (log_probabilities(model) - log_probabilities(source)).abs().max().item() < EXACT


# ProcessWeights


@pytest.mark.parametrize("kind", SAMPLE)
def test_processing_all_of_a_state_dict_keeps_the_log_probabilities(kind: str) -> None:
    source = model_of(kind)
    asked = {name: step.obstacle(source.cfg) is None for name, step in STEPS.items()}
    weights = ProcessWeights.process_weights(source.state_dict(), source.cfg, **asked)
    model = HookedTransformer(source.cfg)
    model.load_state_dict(weights)
    assert (log_probabilities(model) - log_probabilities(source)).abs().max().item() < EXACT
    assert any(not torch.equal(weights[name], value) for name, value in source.state_dict().items())


def test_a_step_that_would_change_the_function_is_left_out_with_a_warning() -> None:
    source = model_of("rms")
    with pytest.warns(UserWarning, match="center_writing_weights is left out"):
        weights = ProcessWeights.process_weights(source.state_dict(), source.cfg)
    assert torch.equal(weights["blocks.0.attn.W_O"], source.state_dict()["blocks.0.attn.W_O"])


@pytest.mark.parametrize("step", STEPS)
def test_each_step_of_process_weights_is_the_models_method(step: str) -> None:
    model = model_of("layer norm")
    function: Callable[..., Weights] = getattr(ProcessWeights, METHODS[step])
    for cfg in (model.cfg, model.cfg.to_dict()):
        assert_same(function(model.state_dict(), cfg), getattr(model, METHODS[step])(model.state_dict()))


def test_the_unembedding_is_centred_without_a_config() -> None:
    model = model_of("layer norm")
    assert_same(ProcessWeights.center_unembed(model.state_dict()), model.center_unembed(model.state_dict()))


def test_single_tensors_are_folded_as_in_a_model() -> None:
    torch.manual_seed(0)
    W, b, gain, bias, x = torch.randn(2, 5, 3), torch.randn(2, 3), torch.randn(5), torch.randn(5), torch.randn(5)
    folded = ProcessWeights.fold_layer_norm_weight_single(W, gain)
    added = ProcessWeights.fold_layer_norm_bias_single(W, b, bias)
    assert torch.allclose(x @ folded + added, (x * gain + bias) @ W + b, atol=1e-5)
    centred = x - x.mean()
    assert torch.allclose(centred @ ProcessWeights.center_weight_single(W), centred @ W, atol=1e-5)


def test_a_toy_model_of_bidirectional_attention_is_loaded_by_the_published_recipe() -> None:
    fields = {"n_layers": 2, "d_model": 12, "n_heads": 2, "d_vocab": 6, "d_vocab_out": 2, "n_ctx": 9}
    cfg = HookedTransformerConfig(
        **fields, act_fn="relu", attention_dir="bidirectional", use_attn_result=True, normalization_type="LN", seed=0
    )
    trained = randomise_(HookedTransformer(cfg)).double()
    file = dict(trained.state_dict())
    file["blocks.0.attn.mask"], file["blocks.0.attn.IGNORE"] = torch.ones(9, 9).bool(), torch.tensor(-1e5)
    model = HookedTransformer(cfg.replace(dtype=torch.float64))
    weights = model.center_writing_weights(file)
    weights = model.center_unembed(weights)
    weights = model.fold_layer_norm(weights)
    weights = model.fold_value_biases(weights)
    model.load_state_dict(weights, strict=False)
    tokens = tiny_tokens(vocab=cfg.d_vocab)
    assert torch.allclose(model(tokens).log_softmax(-1), trained(tokens).log_softmax(-1), rtol=0, atol=EXACT)


assert set(SAMPLE) <= set(KINDS)
