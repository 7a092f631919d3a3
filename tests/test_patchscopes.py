"""Patchscopes: the same readings as by hand, a state in its own place changes nothing, maps that explain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.patchscopes import fit_affine_maps, identity_prompt, patchscope, reading_precision
from tests.helpers import tiny_model

SOURCE = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 9, 1]])
TARGET = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model(n_layers=3, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def reader() -> HookedTransformer:
    return HookedTransformer.from_pretrained("demo-tasks-4l")


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_readings_are_those_by_hand(model: HookedTransformer, site: str, batch_size: int) -> None:
    found = patchscope(
        model,
        SOURCE,
        TARGET,
        source_pos=2,
        target_pos=1,
        source_layers=[0, 2],
        target_layers=[1, 0, 2],
        site=site,
        mapping=lambda states, source, target: states * (1 + source) + target,
        answers=torch.tensor([1, 2, 3]),
        k=3,
        batch_size=batch_size,
        verbose=False,
    )
    assert found.top_tokens.shape == (3, 2, 3, 3)
    for prompt in range(3):
        _, cache = model.run_with_cache(SOURCE[prompt : prompt + 1])
        for i, source in enumerate((0, 2)):
            for j, target in enumerate((1, 0, 2)):
                vector = cache[site, source][0, 2] * (1 + source) + target

                def put(stream: Tensor, hook: object, vector: Tensor = vector) -> Tensor:
                    stream = stream.clone()
                    stream[:, 1] = vector
                    return stream

                logits = model.run_with_hooks(TARGET, fwd_hooks=[(f"blocks.{target}.hook_{site}", put)])
                expected = logits[0, -1].log_softmax(-1)
                values, tokens = expected.topk(3)
                assert torch.allclose(found.top_log_probs[prompt, i, j], values)
                assert found.top_tokens[prompt, i, j].tolist() == tokens.tolist()
                assert found.answer_log_probs is not None
                assert float(found.answer_log_probs[prompt, i, j]) == pytest.approx(float(expected[prompt + 1]))
    assert found.base_tokens.tolist() == model(TARGET)[0, -1].topk(3).indices.tolist()


def test_a_state_put_into_its_own_place_changes_nothing(model: HookedTransformer) -> None:
    found = patchscope(model, TARGET, TARGET, source_pos=2, target_pos=2, k=4, verbose=False)
    values, tokens = model(TARGET)[0, -1].log_softmax(-1).topk(4)
    assert found.target_layers == ()
    for layer in range(3):
        assert torch.allclose(found.top_log_probs[0, layer, 0], values, atol=1e-12)
        assert found.top_tokens[0, layer, 0].tolist() == tokens.tolist()


def test_the_last_state_at_the_last_position_is_read_as_the_model_reads_it(model: HookedTransformer) -> None:
    found = patchscope(model, SOURCE, TARGET, source_layers=[2], k=2, verbose=False)
    assert found.top_tokens[:, 0, 0].tolist() == model(SOURCE)[:, -1].topk(2).indices.tolist()
    assert torch.allclose(found.top_log_probs[:, 0, 0], model(SOURCE)[:, -1].log_softmax(-1).topk(2).values)


def test_prompts_of_other_lengths_are_read_at_their_own_positions(reader: HookedTransformer) -> None:
    prompts = ["Q: What is the capital of France?", "the capital of Italy?"]
    together = patchscope(reader, prompts, "the capital of", source_pos=-2, verbose=False)
    for row, prompt in enumerate(prompts):
        alone = patchscope(reader, prompt, "the capital of", source_pos=-2, verbose=False)
        assert torch.allclose(together.top_log_probs[row], alone.top_log_probs[0], atol=1e-4)
        assert together.top_tokens[row, :, :, 0].tolist() == alone.top_tokens[0, :, :, 0].tolist()


def test_an_attribute_is_read_from_a_word(reader: HookedTransformer) -> None:
    found = patchscope(
        reader,
        ["Q: What is the capital of France?", "Q: What is the capital of Italy?"],
        "Q: What is the capital of Spain?\nA:",
        source_pos=-2,
        target_pos=-5,
        source_layers=[0],
        site="resid_pre",
        answers=[" Paris", " Rome"],
        max_new_tokens=2,
        verbose=False,
    )
    assert [found.read(prompt)[0][0] for prompt in range(2)] == [" Paris", " Rome"]
    assert found.word(int(found.base_tokens[0])) == " Madrid"
    assert found.texts is not None
    assert [one[0][0] for one in found.texts] == [" Paris\n", " Rome\n"]
    assert found.answer_log_probs is not None
    assert float(found.answer_log_probs.exp().min()) > 0.9
    assert found.top(1, prompt=1)[0]["token"] == " Rome"


def test_a_continuation_is_that_of_generate_with_the_state_in_the_prompt(model: HookedTransformer) -> None:
    found = patchscope(model, SOURCE, TARGET, target_pos=1, source_layers=[1], max_new_tokens=4, verbose=False)
    assert found.texts is not None
    states = model.run_with_cache(SOURCE)[1]["resid_post", 1][:, -1]
    for prompt in range(3):
        tokens = TARGET
        for _ in range(4):

            def put(stream: Tensor, hook: object, vector: Tensor = states[prompt]) -> Tensor:
                stream = stream.clone()
                stream[:, 1] = vector
                return stream

            logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", put)])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        assert found.texts[prompt][0][0] == " ".join(map(str, tokens[0, 5:].tolist()))


# Maps


def test_a_map_explains_what_is_affine_and_not_what_is_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    model = tiny_model(n_layers=2, dtype=torch.float64).requires_grad_(False)
    tokens = torch.randint(0, model.cfg.d_vocab, (200, 4), generator=generator)
    matrix = torch.randn(model.cfg.d_model, model.cfg.d_model, generator=generator, dtype=torch.float64)
    kept: dict[str, Tensor] = {}

    def keep(stream: Tensor, hook: object) -> None:
        kept["stream"] = stream.clone()

    def affine(stream: Tensor, hook: object) -> Tensor:
        return kept["stream"] @ matrix + 3.0

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", keep), ("blocks.1.hook_resid_post", affine)]):
        maps = fit_affine_maps(model, tokens, penalty=0.0, verbose=False)
    assert torch.allclose(maps.weights[0, 1], matrix, atol=1e-6)
    assert torch.allclose(maps.biases[0, 1], torch.full((model.cfg.d_model,), 3.0, dtype=torch.float64), atol=1e-6)
    assert float(maps.explained[0, 1]) == pytest.approx(1.0)
    assert (maps.n_fitted, maps.n_held_out) == (150, 50)
    assert maps.top(1)[0][2] == pytest.approx(1.0)
    assert maps.figure().data[0].z.tolist() == maps.explained.tolist()
    assert len(str(maps).splitlines()) == 3
    assert maps.rows()[1] == {"source": 0, "target": 1, "explained": float(maps.explained[0, 1])}
    state = torch.randn(3, model.cfg.d_model, generator=generator, dtype=torch.float64)
    assert torch.allclose(maps(state, 0, 1), state @ matrix + 3.0, atol=1e-5)
    with pytest.raises(ValueError, match="no map from layer 0 to 5: there are maps from"):
        maps(state, 0, 5)

    def noise(stream: Tensor, hook: object) -> Tensor:
        return torch.randn(stream.shape, generator=generator, dtype=torch.float64)

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", noise)]):
        random = fit_affine_maps(model, tokens, source_layers=[0], target_layers=[1], verbose=False)
    assert float(random.explained) < 0.1


def test_a_map_is_used_between_its_layers(model: HookedTransformer) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.cfg.d_vocab, (60, 4), generator=generator)
    maps = fit_affine_maps(model, tokens, source_layers=[0], target_layers=[2], verbose=False)
    found = patchscope(model, SOURCE, TARGET, source_layers=[0], target_layers=[2], mapping=maps, k=1, verbose=False)
    states = model.run_with_cache(SOURCE)[1]["resid_post", 0][:, -1]
    expected = model.logits_of(maps(states, 0, 2)[None])[0].argmax(-1)
    assert found.top_tokens.flatten().tolist() == expected.tolist()


# Precision


def test_precision_is_the_share_of_prompts_read_right(reader: HookedTransformer) -> None:
    prompts = ["When Mary and John went to the store, John gave a drink to", "Q: What is the capital of France?\nA:"]
    prompts += ["Q: What is the capital of Italy?\nA:", "When Anna and Paul went to the park, Anna gave a book to"]
    found = reading_precision(reader, prompts, "The", verbose=False)
    own = [int(reader(prompt)[0, -1].argmax()) for prompt in prompts]
    for layer in range(4):
        lens = [
            int(reader.logits_of(reader.run_with_cache(p)[1]["resid_post", layer])[0, -1].argmax()) for p in prompts
        ]
        scope = patchscope(reader, prompts, "The", source_layers=[layer], k=1, verbose=False).top_tokens.flatten()
        assert float(found.lens[layer]) == sum(a == b for a, b in zip(lens, own, strict=True)) / 4
        assert float(found.patchscope[layer]) == sum(a == b for a, b in zip(scope.tolist(), own, strict=True)) / 4
    assert float(found.lens[-1]) == float(found.patchscope[-1]) == 1.0
    assert found.top(1)[0][1] == 1.0
    assert len(str(found).splitlines()) == 5
    assert list(found.figure().data[0].y) == found.patchscope.tolist()
    with pytest.raises(ValueError, match="one prompt has no interval"):
        reading_precision(reader, prompts[0], "The", verbose=False)


# The identity prompt


def test_an_identity_prompt_repeats_words_and_ends_in_a_placeholder(reader: HookedTransformer) -> None:
    tokens = identity_prompt(reader, [" Mary", " John"], arrow=" and", separator=".", placeholder=" Paris")
    assert reader.to_str_tokens(tokens[0]) == [
        "<|endoftext|>", " Mary", " and", " Mary", ".", " John", " and", " John", ".", " Paris",
    ]  # fmt: skip
    assert reader.to_str_tokens(identity_prompt(reader, [" Mary"], arrow=" and", separator="")[0])[-1] == " Mary"
    with pytest.raises(ValueError, match="' Mary John' is 2 tokens, and a word here is one"):
        identity_prompt(reader, [" Mary John"])
    with pytest.raises(ValueError, match="shows some words: give a list"):
        identity_prompt(reader, " Mary")


# What it shows, and what it refuses


def test_rows_tables_and_figures_hold_the_readings(model: HookedTransformer) -> None:
    found = patchscope(model, SOURCE, TARGET, target_layers=[0, 2], verbose=False)
    rows = found.rows()
    assert [(row["prompt"], row["source"], row["target"]) for row in rows[:3]] == [(0, 0, 0), (0, 0, 2), (0, 1, 0)]
    assert rows[3]["probability"] == pytest.approx(float(found.top_log_probs[0, 1, 1, 0].exp()))
    assert max(float(row["probability"] or 0) for row in rows[:6]) == found.top(1)[0]["probability"]
    assert found.table().splitlines()[0].split() == ["from", "layer", "into", "0", "into", "2"]
    assert found.table(2).splitlines()[-1] == f"without a patch: '{int(found.base_tokens[0])}'"
    assert found.read(1, 2, 0)[0][0] == str(int(found.top_tokens[1, 2, 0, 0]))
    figure = found.figure(1)
    assert figure.data[0].z.tolist() == found.top_log_probs[1, :, :, 0].exp().tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "mlp_out"}, "site is one of resid_pre, resid_mid, resid_post, got 'mlp_out'"),
        ({"k": 0}, "k and batch_size are 1 or more"),
        ({"target_pos": 5}, "the target prompt has 5 tokens, and no position 5"),
        ({"target": torch.tensor([[1, 2], [3, 4]])}, "one target prompt, got 2"),
        ({"source_pos": [[0, 1], [0], [0]]}, "source_pos gives 4 positions for 3 prompts: give one for each"),
        ({"source_layers": [3]}, "3"),
        ({"answers": torch.tensor([1])}, r"answers are one for each of the 3 source prompts, got shape \(1,\)"),
        ({"mapping": lambda states, *layers: states[:1]}, "the mapping made"),
    ],
)
def test_what_cannot_be_read_raises(model: HookedTransformer, settings: dict[str, object], message: str) -> None:
    target = settings.pop("target", TARGET)
    with pytest.raises(ValueError, match=message):
        patchscope(model, SOURCE, target, verbose=False, **settings)  # type: ignore[arg-type]


def test_a_bidirectional_model_has_no_next_token() -> None:
    with pytest.raises(ValueError, match="this model's attention is bidirectional"):
        patchscope(tiny_model(attention_dir="bidirectional"), SOURCE, TARGET, verbose=False)


def test_readings_that_are_not_there_raise(model: HookedTransformer) -> None:
    found = patchscope(model, SOURCE, TARGET, source_layers=[1], verbose=False)
    for call in (lambda: found.table(3), lambda: found.figure(3), lambda: found.top(1, prompt=3)):
        with pytest.raises(ValueError, match="no prompt 3: there are 0 to 2"):
            call()
    with pytest.raises(ValueError, match="no reading of prompt 0 at layer 2"):
        found.read(0, 2)
    with pytest.raises(ValueError, match="no state was put into layer 2"):
        found.read(0, 1, 2)
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)
    with pytest.raises(ValueError, match="too few to hold"):
        fit_affine_maps(model, SOURCE, verbose=False)
    with pytest.raises(ValueError, match="test_share between 0 and 1"):
        fit_affine_maps(model, SOURCE, test_share=1.0, verbose=False)
