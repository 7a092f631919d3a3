"""On the bundled model each of the introductory experiments has its answer, and its control has not."""

from __future__ import annotations

import pytest

from hooked_lm import HookedTransformer
from hooked_lm.demo.tour import MODEL, Tour, take_tour
from hooked_lm.tasks import get_task


@pytest.fixture(scope="module")
def tour() -> Tour:
    return take_tour()


def test_capitals_appear_on_the_way_up_and_one_mlp_is_needed_for_them(tour: Tour) -> None:
    early = tour.early
    assert float((early.ranks[-1] == 0).double().mean()) >= 0.95
    assert float(early.probability[0]) < 0.01
    assert float(early.probability[-1]) > 0.9
    assert float(early.probability_without[early.decisive_mlp]) < 0.1
    others = [layer for layer in range(tour.n_layers) if layer != early.decisive_mlp]
    assert float(early.probability_without[others].min()) > 0.5


def test_the_giver_is_read_where_it_stands_and_carried_at_the_end(tour: Tour) -> None:
    patching = tour.patching
    assert patching.accuracy >= 0.95
    assert float(patching.clean.mean()) > 3 > -3 > float(patching.corrupted.mean())
    giver, last = patching.labels.index(",") + 1, len(patching.labels) - 1
    carriers = patching.carriers()
    assert carriers[0] == [giver]
    assert carriers[-1] == [last]
    # Before the prompts part, there is nothing to bring back.
    assert float(patching.grid[:, :giver].abs().max()) < 1e-4


def test_repeats_are_continued_by_induction_heads_above_a_previous_token_head(tour: Tour) -> None:
    repeats = tour.repeats
    assert repeats.second_accuracy >= 0.9
    assert repeats.first_accuracy < 0.02
    assert repeats.second_log_prob > -0.7 > -6 > repeats.first_log_prob
    assert float(repeats.induction_scores[repeats.induction_head]) >= 0.8
    assert repeats.previous_token_head is not None
    assert float(repeats.previous_token_scores[repeats.previous_token_head]) >= 0.8
    # Embeddings are tied, so a token is spelled out after the first MLP; by chance it would be one in 1886.
    assert repeats.circuit_accuracy is not None
    assert repeats.effective_accuracy is not None
    assert repeats.effective_accuracy > 0.05 > repeats.circuit_accuracy
    # What MLPs add the second time is of little use but in layer 1.
    without = repeats.accuracy_without_mlp.tolist()
    assert 0.6 < without.pop(1) < 0.9
    assert min(without) > 0.95


def test_opposites_are_moved_by_the_mean_state_and_by_a_few_heads_and_by_no_control(tour: Tour) -> None:
    vectors = tour.vectors
    shown = get_task("relations").examples(60, relation="opposite", shots=5, corruption="relation")
    assert not {prompt.rsplit(", ", 1)[-1] for prompt in shown.clean} & set(vectors.asked.clean)
    assert len(vectors.asked) > 40
    state, heads, other, shuffled = vectors.accuracy.max(-1).values.tolist()
    assert vectors.with_examples >= 0.9
    assert vectors.base_accuracy < 0.6
    assert state >= 0.9
    assert heads >= vectors.base_accuracy + 0.3
    assert heads >= vectors.random_accuracy + 0.3
    assert other <= vectors.base_accuracy
    assert vectors.random_accuracy <= vectors.base_accuracy + 0.1
    assert shuffled >= 0.9  # no control here: the kind of word is enough to tell this model's relations apart
    assert len(vectors.vector.heads) <= tour.n_layers * tour.n_heads // 4


def test_three_measures_agree_on_the_name_movers_and_the_behaviour_needs_them(tour: Tour) -> None:
    movers = tour.movers
    assert movers.agreement() > 0.8
    ranks = movers.ranks()
    assert sorted(ranks["attribution"]) == sorted(ranks["direct"]) == [0, 1, 2]
    assert max(ranks["patched"]) < 5
    assert movers.accuracy >= 0.95
    assert movers.accuracy_without < 0.5
    assert float(movers.accuracy_without_others.median()) >= 0.9


def test_a_function_vector_acts_in_a_generation(tour: Tour) -> None:
    model = HookedTransformer.from_pretrained(MODEL)
    vector = tour.vectors.vector.intervention(layer=int(tour.vectors.accuracy[1].argmax()))
    texts = [
        model.generate("dark:", max_new_tokens=1, do_sample=False, verbose=False, interventions=edits)
        for edits in ([], [vector])
    ]
    assert texts[1].endswith("dark: light")
