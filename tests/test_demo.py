"""The bundled demo model does induction, by the circuit that the demo names."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch

from hooked_lm import HookedTransformer, bundled
from hooked_lm.circuits.induction import next_token_scores
from hooked_lm.demo import HELD_OUT_LENGTHS, MODEL, STEPS, DemoResult, random_tokens, run_demo
from hooked_lm.demo.page import demo_figures
from hooked_lm.plotting.style import ORANGE


@pytest.fixture(scope="module")
def demo_result() -> DemoResult:
    return run_demo()


# The bundled model


def test_the_bundled_model_is_found_by_name() -> None:
    folder = bundled.find(MODEL)
    assert folder is not None
    assert MODEL in bundled.names()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["", ".", "..", "gpt2", f"../bundled/{MODEL}", f"{MODEL}/", "__pycache__"])
def test_what_is_not_the_name_of_a_bundled_model_is_not_found(name: str) -> None:
    assert bundled.find(name) is None


def test_looking_up_a_bundled_model_does_not_import_torch() -> None:
    code = "import sys; from hooked_lm import bundled; bundled.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_from_pretrained_loads_the_bundled_model_and_processing_keeps_its_log_probabilities() -> None:
    processed = HookedTransformer.from_pretrained(MODEL)
    trained = HookedTransformer.from_pretrained_no_processing(MODEL)
    assert processed.cfg.model_name == MODEL
    assert trained.processed == ()
    tokens = random_tokens(trained, 24, 0)[:8]
    torch.testing.assert_close(processed(tokens).log_softmax(-1), trained(tokens).log_softmax(-1), atol=1e-3, rtol=1e-4)


def test_the_model_card_gives_seed_data_steps_and_loss() -> None:
    folder = bundled.find(MODEL)
    assert folder is not None
    card = (folder / "README.md").read_text()
    for word in ("seed", "steps", "loss", "data", "held out"):
        assert word in card.lower()


# What the issue asks of it


def test_the_repeat_is_predicted_at_every_length_not_trained_on(demo_result: DemoResult) -> None:
    assert tuple(demo_result.accuracy_by_length) == HELD_OUT_LENGTHS
    assert min(demo_result.accuracy_by_length.values()) >= 0.95
    assert demo_result.second_half.accuracy >= 0.95


def test_the_first_half_is_no_better_than_a_guess(demo_result: DemoResult) -> None:
    assert demo_result.first_half.accuracy < 0.05
    assert demo_result.first_half.log_prob < -4.0 < demo_result.second_half.log_prob


def test_there_is_an_induction_head_in_layer_1_and_a_previous_token_head_in_layer_0(demo_result: DemoResult) -> None:
    assert demo_result.previous_token_head[0] == 0
    assert demo_result.previous_token_score >= 0.8
    assert demo_result.induction_head[0] == 1
    assert demo_result.induction_score >= 0.8


def test_the_pair_has_the_largest_k_composition_of_its_column(demo_result: DemoResult) -> None:
    column = demo_result.k_composition[:, demo_result.induction_head[1]]
    assert int(column.argmax()) == demo_result.previous_token_head[1]
    assert demo_result.pair_composes_most
    assert demo_result.pair_composition == float(column.max())


def test_the_pairs_circuit_matches_most_tokens_with_themselves(demo_result: DemoResult) -> None:
    assert demo_result.circuit_accuracy >= 0.9


def test_ablating_either_head_costs_far_more_than_ablating_a_control(demo_result: DemoResult) -> None:
    intact, induction, previous, *controls = demo_result.ablations
    assert intact.head is None
    assert induction.head == demo_result.induction_head
    assert previous.head == demo_result.previous_token_head
    assert [control.head for control in controls] == [
        (0, int(demo_result.previous_token_scores[0].argmin())),
        (1, int(demo_result.induction_scores[1].argmin())),
    ]
    worst_control = max(control.loss for control in controls)
    assert intact.accuracy >= 0.95
    assert min(induction.loss, previous.loss) > 4 * worst_control
    assert max(induction.accuracy, previous.accuracy) < 0.5


def test_an_ablated_head_writes_nothing(demo_result: DemoResult) -> None:
    """The loss without a head is that of a model whose `W_O` has zeros in its place."""
    model = HookedTransformer.from_pretrained(MODEL)
    tokens = random_tokens(model, demo_result.length, demo_result.seed)
    for ablation in demo_result.ablations:
        cut = HookedTransformer.from_pretrained(MODEL)
        with torch.no_grad():
            if ablation.head is not None:
                layer, head = ablation.head
                cut.blocks[layer].attn.W_O[head] = 0.0
            per_token = cut(tokens, return_type="loss", loss_per_token=True)
        assert float(per_token[:, demo_result.length + 1 :].mean()) == pytest.approx(ablation.loss, rel=1e-4, abs=1e-6)


# The result


def test_the_demo_reports_its_steps_in_order_and_is_the_same_for_the_same_seed(demo_result: DemoResult) -> None:
    seen: list[str] = []
    again = run_demo(on_step=seen.append)
    assert tuple(seen) == STEPS
    assert again.to_dict() == demo_result.to_dict()
    assert run_demo(seed=1).tokens != demo_result.tokens


def test_the_result_is_frozen_and_is_plain_data_as_a_dictionary(demo_result: DemoResult) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        demo_result.length = 3  # type: ignore[misc]
    data = json.loads(json.dumps(demo_result.to_dict()))
    assert data["length"] == demo_result.length
    assert data["induction_scores"][1][demo_result.induction_head[1]] == pytest.approx(demo_result.induction_score)
    assert data["ablations"][0]["label"] == "intact"


def test_the_patterns_are_those_of_the_named_heads_on_the_named_tokens(demo_result: DemoResult) -> None:
    model = HookedTransformer.from_pretrained(MODEL)
    _, cache = model.run_with_cache(torch.tensor([demo_result.tokens]), names_filter="blocks.*.attn.hook_pattern")
    for (layer, head), pattern in (
        (demo_result.previous_token_head, demo_result.previous_token_pattern),
        (demo_result.induction_head, demo_result.induction_pattern),
    ):
        torch.testing.assert_close(pattern, cache["pattern", layer][0, head])


def test_the_curve_is_the_mean_over_the_batch_and_its_halves_are_the_two_numbers(demo_result: DemoResult) -> None:
    model = HookedTransformer.from_pretrained(MODEL)
    tokens = random_tokens(model, demo_result.length, demo_result.seed)
    with torch.no_grad():
        log_prob = next_token_scores(model(tokens), tokens).log_prob
    curve, length = demo_result.log_prob_by_position, demo_result.length
    torch.testing.assert_close(curve, log_prob.mean(0))
    assert float(curve[:length].mean()) == pytest.approx(demo_result.first_half.log_prob, abs=1e-5)
    assert float(curve[length + 1 :].mean()) == pytest.approx(demo_result.second_half.log_prob, abs=1e-5)


def test_the_figures_mark_the_repeat_and_the_pair(demo_result: DemoResult) -> None:
    predictions, scores, patterns, composition, ablations = (section.figures for section in demo_figures(demo_result))
    guess, repeat = predictions[0].layout.shapes
    assert repeat.x0 == demo_result.length + 0.5
    assert guess.y0 == pytest.approx(-math.log(demo_result.d_vocab))
    for figure, expected in (
        (scores[0], demo_result.previous_token_scores),
        (scores[1], demo_result.induction_scores),
        (patterns[0], demo_result.previous_token_pattern),
        (patterns[1], demo_result.induction_pattern),
        (composition[0], demo_result.k_composition),
    ):
        torch.testing.assert_close(torch.tensor(figure.data[0].z), expected)
    colours = ablations[0].data[0].marker.color
    assert colours[1] == colours[2] == ORANGE
    assert colours[0] == colours[3] == colours[4] != colours[1]
    assert list(ablations[0].data[0].x) == [ablation.loss for ablation in demo_result.ablations]
