"""The tour runs every experiment on one model, and its page shows what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hooked_lm import plotting
from hooked_lm.tasks import lexicon, word_tokenizer
from hooked_lm.tour import STEPS, Tour, take_tour
from hooked_lm.tour_page import tour_figures
from tests.helpers import randomise_, tiny_gpt2


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    folder, tokenizer = tmp_path_factory.mktemp("reader"), word_tokenizer(lexicon())
    randomise_(tiny_gpt2(vocab_size=len(tokenizer), n_positions=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen: list[str] = []
    found = take_tour(folder, on_step=seen.append)
    assert tuple(seen) == STEPS
    return found


def test_the_headlines_are_the_numbers_of_the_experiments(tour: Tour) -> None:
    early, patching, repeats, vectors, movers = tour.headlines()
    assert early[1] == f"layer {tour.early.decisive_mlp}"
    assert f"{float(tour.early.probability[-1]):.2f}" in early[2]
    assert patching[1] == f"{tour.patching.accuracy:.0%}"
    assert repeats[1] == f"{tour.repeats.second_accuracy:.0%}"
    assert vectors[1] == f"{float(tour.vectors.accuracy[0].max()):.0%}"
    layer, head = tour.movers.movers[0]
    assert movers[1].startswith(f"L{layer}H{head}, ")


def test_the_tour_is_plain_data(tour: Tour) -> None:
    read = json.loads(json.dumps(tour.to_dict()))
    assert read["repeats"]["induction_head"] == list(tour.repeats.induction_head)
    assert read["patching"]["scores"]["mean"] == tour.patching.grid.tolist()
    assert read["model_name"] == tour.model_name


def test_every_experiment_has_its_figures_on_the_page(tour: Tour, tmp_path: Path) -> None:
    sections = tour_figures(tour)
    assert [section.heading.partition(":")[0] for section in sections] == [name for name, _, _ in tour.headlines()]
    page = plotting.write_page(tmp_path / "tour.html", "Five experiments", "Each on one model.", sections).read_text()
    assert page.count('class="plotly-graph-div"') == sum(len(section.figures) for section in sections) == 9
    lens = sections[0].figures[0].data[0]
    assert list(lens.y) == pytest.approx(tour.early.probability.tolist())
    grid = sections[1].figures[0].data[0]
    assert grid.z[1][3] == pytest.approx(float(tour.patching.grid[1, 3]))


def test_a_model_without_a_tokenizer_has_no_tour() -> None:
    with pytest.raises(ValueError, match="has no tokenizer, and the tasks of the tour are text"):
        take_tour("demo-induction-2l")
