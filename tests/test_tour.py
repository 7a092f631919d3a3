"""The tour runs every experiment on one model, and its page shows what they found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer, plotting
from hooked_lm.circuits.induction import k_composition_qk_circuit
from hooked_lm.demo.tour import STEPS, Tour, take_tour
from hooked_lm.demo.tour_page import tour_figures
from hooked_lm.experiments import continue_repeats
from hooked_lm.experiments.published import Beside, beside_published
from hooked_lm.tasks import lexicon, word_tokenizer
from hooked_lm.tasks.words import RELATIONS
from tests.helpers import randomise_, tiny_config, tiny_gpt2


@pytest.fixture(scope="module")
def tour(reader_folder: Path) -> Tour:
    seen: list[str] = []
    found = take_tour(reader_folder, on_step=seen.append)
    assert tuple(seen) == STEPS
    return found


def test_the_headlines_are_the_numbers_of_the_experiments(tour: Tour) -> None:
    early, patching, repeats, vectors, movers = tour.headlines()
    assert early[1] == f"layer {tour.early.decisive_mlp}"
    assert f"{float(tour.early.probability[-1]):.2f}" in early[2]
    assert patching[1] == f"{tour.patching.accuracy:.0%}"
    assert repeats[1] == f"{tour.repeats.second_accuracy:.0%}"
    assert f"as in the first half {float(tour.repeats.accuracy_without_mlp.min()):.0%}" in repeats[2]
    assert vectors[1] == f"{float(tour.vectors.accuracy[0].max()):.0%}"
    layer, head = tour.movers.movers[0]
    assert movers[1].startswith(f"L{layer}H{head}, ")


def test_the_report_says_every_headline_and_what_was_published(tour: Tour) -> None:
    text = " ".join(tour.report().split())
    for name, number, meaning in tour.headlines():
        assert f"{name} {number} {meaning}." in text
    assert "published" not in text
    beside = dataclasses.replace(tour, published=(Beside("accuracy, second half", 0.5, 0.93),))
    assert "accuracy, second half 0.500 0.930" in " ".join(beside.report().split())


def test_what_was_published_stands_beside_what_is_measured() -> None:
    words = word_tokenizer(lexicon())
    cfg = tiny_config(n_layers=6, n_heads=12, d_head=2, n_ctx=32, d_vocab=len(words))
    model: Any = randomise_(HookedTransformer(cfg, tokenizer=words))
    repeats = continue_repeats(model, n_prompts=2, length=5, verbose=False)
    found = {one.what: one for one in beside_published(model, repeats)}
    john, mary = model.to_single_token(" John"), model.to_single_token(" Mary")
    for giver, published in (("Mary", 4.276), ("John", -2.738)):
        prompt = f"After John and Mary went to the store, {giver} gave a bottle of milk to"
        with torch.no_grad():
            logits = model(prompt)[0, -1]
        one = found[f"logit of John less that of Mary when {giver} gives"]
        assert one.measured == pytest.approx(float(logits[john] - logits[mary]))
        assert one.published == published
    score = found["induction score of L5H5"]
    assert (score.measured, score.published) == (pytest.approx(float(repeats.induction_scores[5, 5])), 0.91)
    previous = repeats.previous_token_scores
    assert found["heads with a higher previous-token score than L4H11"].measured == (previous > previous[4, 11]).sum()
    circuit = k_composition_qk_circuit(model, (4, 11), (5, 5)).AB
    own = (circuit.argmax(-1) == torch.arange(len(circuit))).double().mean()
    assert found["top-1 accuracy of L4H11 into L5H5"].measured == pytest.approx(float(own))


@pytest.mark.online
def test_gpt2_small_gives_the_published_numbers() -> None:
    tour = take_tour("gpt2")
    tolerance = {"log-probability, first half": 0.5, "log-probability, second half": 0.15}
    assert len(tour.published) == 9
    for one in tour.published:
        assert one.measured == pytest.approx(one.published, abs=tolerance.get(one.what, 0.05)), one.what
    assert tour.repeats.induction_head[0] in (5, 6, 7)
    assert tour.patching.accuracy > 0.9


def test_the_tour_is_plain_data(tour: Tour) -> None:
    read = json.loads(json.dumps(tour.to_dict()))
    assert read["repeats"]["induction_head"] == list(tour.repeats.induction_head)
    assert read["patching"]["scores"]["mean"] == tour.patching.grid.tolist()
    assert read["model_name"] == tour.model_name


def test_every_experiment_has_its_figures_on_the_page(tour: Tour, tmp_path: Path) -> None:
    sections = tour_figures(tour)
    assert [section.heading.partition(":")[0] for section in sections] == [name for name, _, _ in tour.headlines()]
    page = plotting.write_page(tmp_path / "tour.html", "Five experiments", "Each on one model.", sections).read_text()
    assert page.count('class="plotly-graph-div"') == sum(len(section.figures) for section in sections) == 10
    lens = sections[0].figures[0].data[0]
    assert list(lens.y) == pytest.approx(tour.early.probability.tolist())
    grid = sections[1].figures[0].data[0]
    assert grid.z[1][3] == pytest.approx(float(tour.patching.grid[1, 3]))


def test_a_tokenizer_that_knows_only_some_of_the_words_takes_the_tour_too(tmp_path: Path) -> None:
    # As GPT-2's: a third of the capitals and names, and the French words, are spelled in pieces.
    known = [text for place, text in enumerate(lexicon()) if text.isascii() and place % 3]
    words = word_tokenizer([*(f" {word}" for word in RELATIONS["opposite"]), *known])
    tiny_gpt2(vocab_size=len(words), n_positions=300).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    found = take_tour(tmp_path)
    assert len(found.vectors.asked) > 20
    assert len(found.early.answer.split()) == 1
    assert tour_figures(found)


def test_a_model_without_a_tokenizer_has_no_tour() -> None:
    with pytest.raises(ValueError, match="has no tokenizer, and the tasks of the tour are text"):
        take_tour("demo-induction-2l")
