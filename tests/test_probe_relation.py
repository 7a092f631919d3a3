"""Relation probes find the map that a model is, where it is one, and nothing in shuffled pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, plotting
from hooked_lm.circuits.logit_lens import read_out
from hooked_lm.probing import RelationProbes, probe_relation
from tests.helpers import tiny_model

D_MODEL, SUBJECTS = 12, 40


def about_subjects(**changes: Any) -> HookedTransformer:
    """A model whose answers depend on the subject more than on anything else."""
    model = tiny_model(d_vocab=SUBJECTS + 2, **changes)
    model.embed.W_E.data[:SUBJECTS] *= 30
    return model


@pytest.fixture(scope="module")
def affine() -> Iterator[HookedTransformer]:
    """Without norms and MLPs, and with even attention, the last stream is affine in the subject's embedding."""
    model = about_subjects(attn_only=True, normalization_type=None)

    def evenly(pattern: Tensor, hook: Any) -> Tensor:
        even = torch.ones_like(pattern).tril()
        return even / even.sum(-1, keepdim=True)

    with model.hooks(fwd_hooks=[("blocks.*.attn.hook_pattern", evenly)]):
        yield model


def prompts() -> Tensor:
    """[subject pos]: the subject at position 1, the same tokens around it."""
    subjects = torch.arange(SUBJECTS)
    return torch.stack([torch.full_like(subjects, SUBJECTS), subjects, torch.full_like(subjects, SUBJECTS + 1)], dim=1)


@pytest.fixture(scope="module")
def found(affine: HookedTransformer) -> RelationProbes:
    return probe_relation(affine, prompts(), 1, "resid_pre", l2=1e-10, verbose=False)


def test_an_affine_relation_is_found_and_holds_for_subjects_that_were_not_fitted(
    affine: HookedTransformer, found: RelationProbes
) -> None:
    assert found.faithfulness.tolist() == [1.0, 1.0]
    _, cache = affine.run_with_cache(prompts())
    for layer in range(2):
        decoded = found.decode(cache["resid_pre", layer][:, 1], layer)
        torch.testing.assert_close(decoded, cache["resid_post", 1][:, -1], atol=1e-4, rtol=1e-4)

    def final(stream: Tensor) -> Tensor:
        def put(x: Tensor, hook: Any) -> Tensor:
            return torch.cat([x[:, :1], stream[None, None], x[:, 2:]], dim=1)

        with affine.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", put)]):
            return affine(prompts()[:1], stop_at_layer=2)[0, -1]

    # Where nothing but the subject's stream differs, the map is the model's derivative, though none was taken.
    derivative = torch.autograd.functional.jacobian(final, cache["resid_pre", 0][0, 1])
    torch.testing.assert_close(found.weights[0], derivative, atol=1e-4, rtol=1e-4)


def test_answers_are_the_models_own_and_subjects_are_held_out(affine: HookedTransformer, found: RelationProbes) -> None:
    own = affine(prompts())[:, -1].argmax(-1)
    assert found.answers.tolist() == own[found.subjects].tolist()
    assert len(found.subjects) == 10
    assert found.n_fitted == 30
    fitted = [one for one in range(SUBJECTS) if one not in found.subjects.tolist()]
    commonest = own[fitted].mode().values
    assert found.majority == pytest.approx(float((found.answers == commonest).double().mean()))
    for layer in range(2):
        _, cache = affine.run_with_cache(prompts())
        stream = cache["resid_pre", layer][found.subjects, 1]
        assert read_out(affine, found.decode(stream, layer)).argmax(-1).tolist() == found.predicted[layer].tolist()


def test_shuffled_pairs_have_no_map(found: RelationProbes) -> None:
    assert bool((found.shuffled < 0.5).all())


def test_a_relation_that_is_not_affine_is_not_faithful(affine: HookedTransformer) -> None:
    """The last block writes a random vector for each subject."""
    random = 1000 * torch.randn(SUBJECTS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    seen: list[Tensor] = []

    def look(tokens: Tensor, hook: Any) -> None:
        seen[:] = [tokens[:, 1]]

    def write(stream: Tensor, hook: Any) -> Tensor:
        stream = stream.clone()
        stream[:, -1] += random[seen[0]]
        return stream

    with affine.hooks(fwd_hooks=[("hook_tokens", look), ("blocks.1.hook_resid_post", write)]):
        found = probe_relation(affine, prompts(), 1, layers=[0], verbose=False)
        own = affine(prompts())[:, -1].argmax(-1)
    assert float(found.faithfulness[0]) < 0.4
    # Of the answers fitted: of those held out, the commonest is one in ten at least.
    fitted = torch.tensor([one for one in range(SUBJECTS) if one not in found.subjects.tolist()])
    share = float((own[found.subjects] == own[fitted].mode().values).double().mean())
    assert found.majority == share < 0.1
    assert found.layers == (0,)


def test_a_subject_in_two_prompts_is_on_one_side(affine: HookedTransformer) -> None:
    other = prompts()
    other[:, 0] = SUBJECTS + 1
    found = probe_relation(affine, torch.cat([prompts(), other]), 1, l2=1e-6, verbose=False)
    assert found.subjects.bincount().unique().tolist() == [0, 2]
    alone = probe_relation(affine, prompts(), 1, groups=torch.arange(SUBJECTS) // 10, test_share=0.5, verbose=False)
    assert sorted((alone.subjects // 10).bincount().tolist())[-2:] == [10, 10]


def test_results_are_shown(found: RelationProbes) -> None:
    lines = found.table().splitlines()
    assert lines[0].split() == ["layer", "faithfulness", "interval", "shuffled", "majority"]
    assert lines[1].split()[:5] == ["0", "1.00", "1.00", "to", "1.00"]
    assert len({len(line) for line in lines}) == 1
    assert str(found) == found.table()
    assert found.rows()[1] == {
        "layer": 1,
        "faithfulness": 1.0,
        "low": 1.0,
        "high": 1.0,
        "shuffled": float(found.shuffled[1]),
        "majority": found.majority,
    }
    assert found.top(1) == [(0, 1.0)]
    assert found.errors(0) == []
    figure = found.figure("A relation")
    assert isinstance(figure, plotting.Figure)
    curves = {trace.name: list(trace.y) for trace in figure.data}
    assert curves == {"faithfulness": [1.0, 1.0], "shuffled pairs": pytest.approx(found.shuffled.tolist())}


def test_errors_name_the_subject_and_both_answers() -> None:
    found = probe_relation(about_subjects(), prompts(), 1, l2=100.0, verbose=False)
    errors = found.errors(1)
    wrong = (found.predicted[1] != found.answers).nonzero()[:, 0].tolist()
    assert errors == [
        (str(int(found.subjects[at])), str(int(found.predicted[1, at])), str(int(found.answers[at]))) for at in wrong
    ]
    assert errors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"subject_pos": [[0, 1]] * SUBJECTS}, "one subject in each prompt: give one position for each"),
        ({"subject_pos": 3}, "prompt 0 has 3 tokens"),
        ({"l2": 0.0}, "l2 is a number above 0"),
        ({"groups": [1, 2]}, "2 groups came for 40 examples"),
        ({"subject_pos": 0}, "1 groups cannot be divided"),
        ({"test_share": 0.0}, "test_share is between 0 and 1"),
        ({"layers": [5]}, "no layer 5"),
    ],
)
def test_what_is_no_relation_raises(affine: HookedTransformer, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_relation(affine, prompts(), **{"subject_pos": 1, "verbose": False, **how})


def test_layers_and_widths_that_were_not_probed_raise(found: RelationProbes) -> None:
    with pytest.raises(ValueError, match="layer 2 was not probed: there are 0, 1"):
        found.decode(torch.zeros(D_MODEL), 2)
    with pytest.raises(ValueError, match=r"subjects are \[\*example 12\], got \(3,\)"):
        found.decode(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)
