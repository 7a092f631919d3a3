"""The model's own methods for processing its weights give what `from_pretrained` gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hooked_lm import HookedTransformer
from hooked_lm.weights import STEPS
from tests.helpers import randomise_, tiny_config, tiny_tokens
from tests.weights_helpers import EXACT, KINDS, log_probabilities, mean, model_of

# The model's own methods


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with unprocessed models, by kind."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        path = root / kind
        if not path.exists():
            model_of(kind).save_pretrained(path)
        return path

    return folder


def assert_same_model(one: HookedTransformer, other: HookedTransformer) -> None:
    assert one.cfg.replace(model_name="", init_weights=True) == other.cfg.replace(model_name="", init_weights=True)
    assert one.processed == other.processed
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=0, atol=1e-13), name


PROCESSED_KINDS = [
    "layer norm",
    "gated rms",
    "grouped queries",
    "experts",
    "solu_ln",
    "solu_ln rms",
    "rotary",
    "final rms",
    "tied, scaled",
    "norms on the stream",
    "attention sinks",
    "gated attention",
    "experts from block to block",
    "experts from block to block, rms, identities",
    "identities among the experts",
    "a layer before the unembedding",
    "shared expert",
]


@pytest.mark.parametrize("kind", PROCESSED_KINDS)
def test_processing_a_model_in_place_gives_what_from_pretrained_gives(kind: str, saved: Callable[[str], Path]) -> None:
    loaded = HookedTransformer.from_pretrained(saved(kind))
    model = HookedTransformer.from_pretrained_no_processing(saved(kind))
    model.process_weights_()
    assert_same_model(model, loaded)
    assert (log_probabilities(model) - log_probabilities(loaded)).abs().max().item() < EXACT
    assert (log_probabilities(loaded) - log_probabilities(model_of(kind))).abs().max().item() < EXACT


@pytest.mark.parametrize("kind", PROCESSED_KINDS)
def test_loading_and_processing_a_state_dict_gives_what_from_pretrained_gives(
    kind: str, saved: Callable[[str], Path]
) -> None:
    model = HookedTransformer(tiny_config(**KINDS[kind]))
    model.load_and_process_state_dict(model_of(kind).state_dict())
    assert_same_model(model, HookedTransformer.from_pretrained(saved(kind)))


def test_loading_and_processing_forgets_what_the_old_weights_went_through() -> None:
    model = randomise_(HookedTransformer(tiny_config()))
    model.center_unembed()
    model.load_and_process_state_dict(model_of("layer norm").state_dict(), *[False] * len(STEPS))
    assert model.processed == ()
    assert torch.equal(model.W_U, model_of("layer norm").W_U)


def test_the_single_methods_one_after_another_give_what_from_pretrained_gives(saved: Callable[[str], Path]) -> None:
    model = HookedTransformer.from_pretrained_no_processing(saved("layer norm"))
    model.fold_layer_norm()
    model.center_writing_weights()
    model.center_unembed()
    model.fold_value_biases()
    model.refactor_factored_attn_matrices()
    loaded = HookedTransformer.from_pretrained(saved("layer norm"), refactor_factored_attn_matrices=True)
    assert_same_model(model, loaded)


@pytest.mark.parametrize("load", ["process_weights_", "load_and_process_state_dict"])
def test_the_classic_positional_flags_mean_the_steps_in_their_order(load: str) -> None:
    steps = list(STEPS)
    if load == "process_weights_":
        steps = [*steps[:3], "refactor_factored_attn_matrices", "fold_value_biases"]
    for position, step in enumerate(steps):
        flags = [position == i for i in range(len(STEPS))]
        model = randomise_(HookedTransformer(tiny_config()))
        if load == "process_weights_":
            model.process_weights_(*flags)
        else:
            model.load_and_process_state_dict(model_of("layer norm").state_dict(), *flags)
        assert model.processed == (step,)


def test_the_methods_centre_when_called_whatever_the_norm() -> None:
    model = randomise_(HookedTransformer(tiny_config(normalization_type="RMS")))
    model.center_writing_weights()
    assert mean(model.W_E, -1) < 1e-12
    assert mean(model.W_out, -1) < 1e-12
    model.center_unembed()
    assert mean(model.W_U, -1) < 1e-12


def test_loading_warns_where_a_step_asked_for_would_change_the_function(saved: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="center_writing_weights is left out, .*only LayerNorm ignores"):
        model = HookedTransformer.from_pretrained(saved("rms"), center_writing_weights=True)
    assert "center_writing_weights" not in model.processed
    with pytest.warns(UserWarning, match="refactor_factored_attn_matrices is left out, .*rotary"):
        model = HookedTransformer.from_pretrained(saved("rotary"), refactor_factored_attn_matrices=True)
    assert (log_probabilities(model) - log_probabilities(model_of("rotary"))).abs().max().item() < EXACT


def test_processing_in_place_warns_where_a_step_asked_for_would_change_the_function() -> None:
    model = randomise_(HookedTransformer(tiny_config(normalization_type="RMS")))
    with pytest.warns(UserWarning, match="center_writing_weights is left out, .*only LayerNorm ignores"):
        model.process_weights_(center_writing_weights=True)
    assert (log_probabilities(model) - log_probabilities(model_of("rms"))).abs().max().item() < EXACT


def test_refactoring_a_rotary_model_raises_and_leaves_it_as_it_was() -> None:
    model = randomise_(HookedTransformer(tiny_config(**KINDS["rotary"])))
    with pytest.raises(ValueError, match="rotary positions"):
        model.refactor_factored_attn_matrices()
    assert model.processed == ()
    assert torch.equal(log_probabilities(model), log_probabilities(model_of("rotary")))


def test_processing_twice_changes_nothing_more() -> None:
    model = randomise_(HookedTransformer(tiny_config()))
    model.process_weights_()
    once = {name: value.clone() for name, value in model.state_dict().items()}
    model.process_weights_()
    assert model.state_dict().keys() == once.keys()
    assert all(torch.allclose(value, once[name], rtol=0, atol=1e-13) for name, value in model.state_dict().items())


def test_a_processed_model_trains() -> None:
    model = randomise_(HookedTransformer(tiny_config()))
    model.process_weights_()
    model(tiny_tokens(), return_type="loss").backward()
    assert all(parameter.grad is not None and parameter.is_leaf for parameter in model.parameters())


def test_the_hooks_of_a_model_survive_its_processing() -> None:
    model = randomise_(HookedTransformer(tiny_config()))
    seen = []
    model.add_hook("blocks.0.ln1.hook_normalized", lambda x, hook: seen.append(hook.name))
    model.process_weights_()
    model(tiny_tokens())
    assert seen == ["blocks.0.ln1.hook_normalized"]
