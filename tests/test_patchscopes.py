"""Patchscopes equal single hooked runs; lenses and affine maps equal their definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, UnknownHookError
from hooked_lm.circuits.logit_lens import logit_lens
from hooked_lm.patchscopes import AffineMaps, Patchscope, compare_lenses, fit_affine_maps, identity_prompt, patchscope
from hooked_lm.probing.division import hold_out
from tests.architectures_helpers import ROTARY
from tests.helpers import CORPUS, VOCAB, counted, randomise_, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

QUIET: dict[str, Any] = {"verbose": False}
TARGET = tiny_tokens(batch=1, pos=6, seed=5)[0]
SOURCES = tiny_tokens(batch=3, pos=4, seed=6)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parallel": {"parallel_attn_mlp": True, **ROTARY},
    "norms on the stream": {"norm_placement": "residual"},
    "shortformer": {"positional_embedding_type": "shortformer", "n_heads": 4, "n_key_value_heads": 2},
    "attention only": {"attn_only": True},
    "sinks, a window": {"attention_sinks": True, "use_local_attn": True, "window_size": 2, "attn_types": ["local"] * 2},
}


@pytest.fixture(scope="module")
def reader() -> HookedTransformer:
    """Reads text."""
    return randomise_(HookedTransformer(tiny_config(n_ctx=60, d_vocab=VOCAB), tiny_tokenizer()))  # type: ignore[return-value]


def put(state: Tensor, pos: int, activation: Tensor, hook: Any) -> Tensor:
    if activation.shape[1] > pos:
        activation[:, pos] = state
    return activation


def said(model: HookedTransformer, target: Tensor, state: Tensor, layer: int, pos: int, site: str) -> Tensor:
    """The log-probabilities after a target with a state in it, in a run of its own."""
    hook = (f"blocks.{layer}.hook_{site}", partial(put, state, pos))
    logits = model.run_with_hooks(target[None], fwd_hooks=[hook])[0, -1]
    return logits.detach().log_softmax(-1)


def states(model: HookedTransformer, prompt: Any, layer: int, pos: int, site: str) -> Tensor:
    _, cache = model.run_with_cache(prompt)
    return cache[site, layer][0, pos].detach()


# One run for each cell


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_every_cell_of_a_grid_is_a_hooked_run(fields: dict[str, Any], site: Any) -> None:
    model, pos = tiny_model(**fields), (2, -1, 0)
    if f"blocks.0.hook_{site}" not in model.hook_dict:
        with pytest.raises(UnknownHookError, match="resid_mid"):
            patchscope(model, SOURCES, TARGET, site=site, **QUIET)
        return
    options: dict[str, Any] = {"source_pos": pos, "target_pos": 3, "target_layers": (1, 0), "site": site, "top_k": 20}
    found = patchscope(model, SOURCES, TARGET, answers=[4, 5, 6], batch_size=5, **options, **QUIET)
    assert found.cells == ((0, 1), (0, 0), (1, 1), (1, 0))
    assert found.source_tokens.tolist() == [int(SOURCES[row, at]) for row, at in enumerate(pos)]
    assert found.answer_log_probs is not None
    assert found.answer_ranks is not None
    for cell, (source, target) in enumerate(found.cells):
        for prompt in range(3):
            state = states(model, SOURCES[prompt], source, pos[prompt], site)
            expected = said(model, TARGET, state, target, 3, site)
            got = torch.empty(20, dtype=torch.float64)
            got[found.top_tokens[cell, prompt]] = found.top_log_probs[cell, prompt]
            assert torch.allclose(got, expected, atol=1e-10)
            assert float(found.answer_log_probs[cell, prompt]) == pytest.approx(float(expected[4 + prompt]))
            assert int(found.answer_ranks[cell, prompt]) == int((expected > expected[4 + prompt]).sum())
            assert found.top_log_probs[cell, prompt].diff().max() <= 0


def test_each_state_goes_into_its_own_layer_unless_others_are_named() -> None:
    model = tiny_model(n_layers=3)
    found = patchscope(model, SOURCES, TARGET, source_layers=(-1, 0), **QUIET)
    whole = patchscope(model, SOURCES, TARGET, target_layers=range(3), **QUIET)
    assert found.cells == ((2, 2), (0, 0))
    grid = whole.grid(whole.top_log_probs)
    assert torch.allclose(found.top_log_probs, torch.stack((grid[2, 2], grid[0, 0])))
    with pytest.raises(ValueError, match="target_layers"):
        found.grid(found.top_log_probs)


def test_the_last_layers_state_at_the_end_gives_the_sources_own_prediction() -> None:
    model = tiny_model()
    own = model(SOURCES)[:, -1].detach().log_softmax(-1)
    found = patchscope(model, SOURCES, TARGET, source_layers=[-1], answers=own.argmax(-1), top_k=20, **QUIET)
    assert torch.allclose(found.top_log_probs[0], own.sort(descending=True).values, atol=1e-10)
    assert found.precision.tolist() == [1.0]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_prompts_own_state_in_its_place_changes_nothing(site: Any) -> None:
    model = tiny_model()
    unpatched = model(TARGET[None], logits_to_keep=1)[:, -1].detach().log_softmax(-1).sort(descending=True).values
    for pos in (0, 3, -1):
        options: dict[str, Any] = {"source_pos": pos, "target_pos": pos, "site": site, "top_k": 20, "batch_size": 1}
        found = patchscope(model, TARGET[None], TARGET, **options, **QUIET)
        assert torch.allclose(found.top_log_probs, unpatched.expand(2, 1, -1), atol=1e-12, rtol=0)
        # With a hook in place whole prompts run, and not even the rounding is another.
        with model.hooks(fwd_hooks=[("hook_embed", lambda activation, hook: None)]):
            whole = patchscope(model, TARGET[None], TARGET, **options, **QUIET)
        assert torch.equal(whole.top_log_probs, unpatched.expand(2, 1, -1))


def test_what_comes_before_the_state_runs_once_unless_hooks_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model(), counted(monkeypatch, HookedTransformer, "forward")
    patchscope(model, SOURCES, TARGET, target_pos=4, target_layers=(0, 1), batch_size=4, **QUIET)
    assert [tuple(call[1].shape) for call in calls] == [(3, 4), (1, 4), (4, 2), (4, 2), (4, 2)]
    calls.clear()
    patchscope(model, SOURCES, TARGET, target_pos=4, source_layers=[0], max_new_tokens=2, **QUIET)
    assert [tuple(call[1].shape) for call in calls] == [(3, 4), (3, 6), (3, 1)]
    calls.clear()
    zeroed = Intervention("blocks.0.attn.hook_z", "zero", pos=1, head=2)
    with model.intervening([zeroed]):
        found = patchscope(model, TARGET[None], TARGET, target_pos=4, source_layers=[0], top_k=20, **QUIET)
        _, cache = model.run_with_cache(TARGET[None])
        expected = said(model, TARGET, cache["resid_post", 0][0, -1].detach(), 0, 4, "resid_post")
    assert [tuple(call[1].shape) for call in calls[:2]] == [(1, 6), (1, 6)]
    assert torch.allclose(found.top_log_probs[0, 0], expected.sort(descending=True).values, atol=1e-12)
    assert not torch.allclose(
        found.top_log_probs,
        patchscope(model, TARGET[None], TARGET, target_pos=4, source_layers=[0], top_k=20, **QUIET).top_log_probs,
    )


def wired() -> HookedTransformer:
    """The head of layer 1 copies the token at position 2 to the prediction at the last position, 4."""
    fields = {"attn_only": True, "normalization_type": None, "act_fn": None, "use_attn_scale": False}
    model = tiny_model(**fields, n_layers=3, d_model=21, n_heads=1, d_head=8, n_ctx=5, d_vocab=8)
    identity = torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :8] = identity
        model.pos_embed.W_pos[:, 8:13] = torch.eye(5)
        model.unembed.W_U[13:] = 30 * identity
        attn = model.blocks[1].attn
        attn.W_Q[0, 12, 0], attn.W_K[0, 10, 0] = 10.0, 10.0
        attn.W_V[0, :8], attn.W_O[0, :, 13:] = identity, identity
    return model


def test_a_wired_model_says_the_sources_token_until_it_has_read_the_targets() -> None:
    model, target = wired(), torch.tensor([1, 2, 3, 4, 5])
    # Sources with their tokens where the target has its own, so that the position in the state fits.
    sources = torch.tensor([[0, 0, 6, 0], [0, 0, 7, 0]])
    options: dict[str, Any] = {"source_pos": 2, "target_pos": 2, "target_layers": range(3), **QUIET}
    found = patchscope(model, sources, target, answers=[6, 7], site="resid_pre", **options)
    assert found.grid(found.precision).tolist() == [[1.0, 1.0, 0.0]] * 3
    own = patchscope(model, sources, target, answers=3, site="resid_pre", **options)
    assert own.grid(own.precision).tolist() == [[0.0, 0.0, 1.0]] * 3
    low, high = found.precision_interval()
    assert (low.tolist(), high.tolist()) == (found.precision.tolist(), found.precision.tolist())
    assert found.top(1)[0][:4] in {(0, 0, 0, "6"), (0, 0, 1, "7")}


# Sources and runs


def test_sources_of_different_lengths_are_read_as_each_is_alone(reader: HookedTransformer) -> None:
    together = patchscope(reader, CORPUS, "The capital of", source_pos=[3, -2, -1], **QUIET)
    for row, (text, pos) in enumerate(zip(CORPUS, (3, -2, -1), strict=True)):
        alone = patchscope(reader, text, "The capital of", source_pos=pos, **QUIET)
        assert torch.allclose(together.top_log_probs[:, row], alone.top_log_probs[:, 0], atol=1e-10)
        assert together.source_tokens[row] == alone.source_tokens[0]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_change_nothing(batch_size: int) -> None:
    model = tiny_model()
    found = patchscope(model, SOURCES, TARGET, target_layers=(0, 1), batch_size=batch_size, max_new_tokens=2, **QUIET)
    expected = patchscope(model, SOURCES, TARGET, target_layers=(0, 1), max_new_tokens=2, **QUIET)
    assert torch.allclose(found.top_log_probs, expected.top_log_probs, atol=1e-12)
    assert torch.equal(found.new_tokens, expected.new_tokens)  # type: ignore[arg-type]


def test_a_float32_model_reads_the_same() -> None:
    model = tiny_model(dtype=torch.float32)
    model.load_state_dict(tiny_model().state_dict())
    found, exact = (patchscope(one, SOURCES, TARGET, **QUIET) for one in (model, tiny_model()))
    assert torch.allclose(found.top_log_probs.double(), exact.top_log_probs, atol=1e-5)


def test_continuations_are_greedy_runs_with_the_state_in_place_at_every_step() -> None:
    model = tiny_model()
    found = patchscope(model, SOURCES, TARGET, target_pos=2, max_new_tokens=4, **QUIET)
    assert found.new_tokens is not None
    for cell, (source, target) in enumerate(found.cells):
        for prompt in range(3):
            text, state = TARGET, states(model, SOURCES[prompt], source, -1, "resid_post")
            for _ in range(4):
                best = said(model, text, state, target, 2, "resid_post").argmax()
                text = torch.cat((text, best[None]))
            assert found.new_tokens[cell, prompt].tolist() == text[6:].tolist()
            assert found.texts is not None
            assert found.texts[cell][prompt] == " ".join(map(str, text[6:].tolist()))
    without = patchscope(model, SOURCES, TARGET, target_pos=2, **QUIET)
    assert torch.allclose(found.top_log_probs, without.top_log_probs, atol=1e-12)
    assert torch.equal(found.top_tokens[..., 0], found.new_tokens[..., 0])


def test_a_continuation_ends_as_text_where_the_text_ends(reader: HookedTransformer) -> None:
    model = randomise_(HookedTransformer(reader.cfg, tiny_tokenizer()))
    with torch.no_grad():
        model.unembed.b_U[0] += 1000.0  # type: ignore[operator, union-attr]
    found = patchscope(model, CORPUS[:2], "The capital", max_new_tokens=3, batch_size=1, **QUIET)  # type: ignore[arg-type]
    assert found.texts == (("", ""), ("", ""))
    assert found.new_tokens is not None
    assert found.new_tokens.shape == (2, 2, 1)
    plain = patchscope(reader, CORPUS[:2], "The capital", max_new_tokens=3, **QUIET)
    assert plain.new_tokens is not None
    assert plain.texts is not None
    assert plain.texts[0][1] == reader.to_string(plain.new_tokens[0, 1])


def test_a_text_that_ends_before_those_of_other_batches_is_padded_with_its_end(reader: HookedTransformer) -> None:
    model = randomise_(HookedTransformer(reader.cfg, tiny_tokenizer()))
    with torch.no_grad():
        model.unembed.W_U[0, 0] += 100.0  # type: ignore[operator, index]
    ends = torch.tensor([10.0, -10.0])[:, None] * torch.eye(12)[0]
    options: dict[str, Any] = {"source_layers": [-1], "mapping": lambda given, source, target: ends, "batch_size": 1}
    found = patchscope(model, CORPUS[:2], "The", max_new_tokens=3, **options, **QUIET)  # type: ignore[arg-type]
    assert found.new_tokens is not None
    first, second = found.new_tokens[0].tolist()
    assert len(second) > 1
    assert (set(first), second[0] != 0) == ({0}, True)


# Mappings


def test_a_mapping_gets_states_and_layers_and_its_states_are_put_in() -> None:
    model, seen = tiny_model(), []

    def doubled(given: Tensor, source: int, target: int) -> Tensor:
        seen.append((tuple(given.shape), source, target))
        return 2 * given + target

    found = patchscope(model, SOURCES, TARGET, target_layers=(1,), mapping=doubled, top_k=20, **QUIET)
    assert seen == [((3, 12), 0, 1), ((3, 12), 1, 1)]
    expected = said(model, TARGET, 2 * states(model, SOURCES[2], 0, -1, "resid_post") + 1, 1, 5, "resid_post")
    assert torch.allclose(found.top_log_probs[0, 2], expected.sort(descending=True).values, atol=1e-10)


@pytest.mark.parametrize(
    "mapping", [lambda s, a, b: s[:, :5], lambda s, a, b: s * float("nan"), lambda s, a, b: s.tolist()]
)
@pytest.mark.usefixtures("no_type_checks")
def test_a_mapping_that_returns_no_states_is_refused(mapping: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="mapping returns finite states"):
        patchscope(tiny_model(), SOURCES, TARGET, mapping=mapping, **QUIET)


def test_affine_maps_are_least_squares_and_explain_what_they_say() -> None:
    model, tokens = tiny_model(n_layers=3), tiny_tokens(batch=40, pos=6)
    maps = fit_affine_maps(model, tokens, (1, -1), source_layers=(0, 2), l2=1e-12, **QUIET)
    assert (maps.n_fitted, maps.n_held_out) == (150, 50)
    assert (maps.source_layers, maps.target_layers) == ((0, 2), (1, 2))
    _, cache = model.run_with_cache(tokens)
    x, y = (cache["resid_post", layer][:, 1:].flatten(0, 1).detach() for layer in (0, 1))
    error = (maps(x, 0, 1) - y).reshape(40, 5, 12)
    # The prompts fitted are the 30 whose errors are orthogonal to their inputs.
    with_one = torch.cat((x, torch.ones(200, 1)), 1).reshape(40, 5, 13)
    fitted = _fitted_prompts(model, tokens)
    assert float((with_one[fitted].flatten(0, 1).T @ error[fitted].flatten(0, 1)).abs().max()) < 1e-6
    held_out, mean = error[~fitted], y.reshape(40, 5, 12)[fitted].mean((0, 1))
    spread = y.reshape(40, 5, 12)[~fitted] - mean
    assert float(maps.r2[0, 0]) == pytest.approx(float(1 - held_out.square().sum() / spread.square().sum()))
    assert float(maps.r2[1, 1]) == pytest.approx(1.0)  # a layer's states to themselves
    assert torch.allclose(maps(x[:2], 2, 2), x[:2], atol=1e-8)


def _fitted_prompts(model: HookedTransformer, tokens: Tensor) -> Tensor:
    groups = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1] - 1)
    held_out = hold_out(groups, 0.25, torch.Generator().manual_seed(0))
    return ~held_out.reshape(len(tokens), -1)[:, 0]


def test_a_map_explains_no_more_than_the_source_knows() -> None:
    model = tiny_model(n_layers=2, attn_only=True, normalization_type=None, d_vocab=1000)
    with torch.no_grad():
        # Layer 1 adds the mean of the tokens so far: from the token alone, the others cannot be known.
        attn, n = model.blocks[1].attn, 12
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.normal_(generator=torch.Generator().manual_seed(0))
        model.blocks[0].attn.b_O.fill_(1.0)
        assert attn.W_V.shape[2] * attn.W_V.shape[0] == n
        for head in range(3):
            attn.W_V[head, 4 * head : 4 * head + 4] = torch.eye(4)
            attn.W_O[head, :, 4 * head : 4 * head + 4] = torch.eye(4)
    tokens = tiny_tokens(batch=80, pos=8, vocab=1000)
    maps = fit_affine_maps(model, tokens, (1,), **QUIET)
    _, cache = model.run_with_cache(tokens)
    x, y = cache["resid_post", 0], cache["resid_post", 1]
    others = (y - x)[:, 1:]
    assert float(maps.r2[0, 0]) < 1 - 0.5 * float(others.var() / y[:, 1:].var())
    assert float(maps.r2[1, 0]) == pytest.approx(1.0, abs=1e-3)


def test_maps_of_other_layers_and_widths_are_refused() -> None:
    model, tokens = tiny_model(), tiny_tokens(batch=8, pos=6)
    maps = fit_affine_maps(model, tokens, source_layers=[0], **QUIET)
    for states_of, layers, message in (
        (torch.ones(2, 12), (1, 1), "no map of layer 1"),
        (torch.ones(2, 12), (0, 0), "no map of layer 0"),
        (torch.ones(2, 5), (0, 1), r"\[\*example 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            maps(states_of, *layers)
    with pytest.raises(ValueError, match="is empty"):
        fit_affine_maps(model, tokens, (), **QUIET)
    with pytest.raises(ValueError, match="groups"):
        fit_affine_maps(model, tokens[:3], **QUIET)
    with pytest.raises(ValueError, match="l2"):
        fit_affine_maps(model, tokens, l2=0.0, **QUIET)
    assert [row["r2"] for row in maps.rows()] == maps.r2.flatten().tolist()
    assert maps.top(1) == [(0, 1, float(maps.r2[0, 0]))]
    assert str(maps).split() == ["r2", "of", "layer", "to", "1", "0", f"{float(maps.r2[0, 0]):.3f}"]
    assert list(maps.figure().data[0].y) == pytest.approx(maps.r2[:, 0].tolist())


# Lenses


def test_lenses_are_compared_on_the_models_own_next_token(reader: HookedTransformer) -> None:
    texts = [*CORPUS, "Rome and Paris", "A B A", "the store"]
    maps = fit_affine_maps(reader, CORPUS * 2 + texts[3:], pos=None, **QUIET)
    found = compare_lenses(reader, texts, maps=maps, batch_size=4, **QUIET)
    assert found.lenses == ("patchscope", "logit lens", "affine map")
    for row, text in enumerate(texts):
        own = int(reader(text)[0, -1].argmax())
        assert int(found.answers[row]) == own
        lens = logit_lens(reader, text, targets=own, sites=["resid_post"], positions=-1, **QUIET)
        for layer in range(2):
            scope = patchscope(reader, text, identity_prompt(reader), source_layers=[layer], answers=own, **QUIET)
            assert scope.answer_log_probs is not None
            assert float(found.surprisal[0, layer, row]) == pytest.approx(-float(scope.answer_log_probs[0, 0]))
            assert float(found.correct[0, layer, row]) == float(scope.precision[0])
            assert float(found.surprisal[1, layer, row]) == pytest.approx(-float(lens.target_log_probs[layer, 0, 0, 0]))
            assert float(found.correct[1, layer, row]) == float(lens.target_ranks[layer, 0, 0, 0] == 0)
            mapped = maps(states(reader, text, layer, -1, "resid_post")[None, None], layer, 1)
            log_probs = reader.logits_of(mapped).detach().log_softmax(-1)[0, 0]
            assert float(found.surprisal[2, layer, row]) == pytest.approx(-float(log_probs[own]))
    assert torch.equal(found.precision, found.correct.mean(-1))
    assert found.precision[:2, 1].tolist() == [1.0, 1.0]
    assert bool((found.low <= found.precision).all())
    assert bool((found.precision <= found.high).all())


def test_without_maps_there_are_two_lenses_and_a_target_of_ones_own_is_taken() -> None:
    found = compare_lenses(tiny_model(), SOURCES, target=TARGET, pos=2, layers=[1], **QUIET)
    assert (found.lenses, found.layers) == (("patchscope", "logit lens"), (1,))
    assert torch.equal(found.target.tokens, TARGET)
    assert found.top(1) == [("patchscope", 1, 1.0)]
    assert [row["precision"] for row in found.rows()] == found.precision.flatten().tolist()
    assert str(found).splitlines()[1].split()[:4] == ["patchscope", "1", "1.00", "1.00"]
    assert [trace.name for trace in found.figure().data] == ["patchscope", "logit lens"]


def test_maps_that_do_not_lead_to_the_last_layer_are_refused() -> None:
    model, tokens = tiny_model(), tiny_tokens(batch=8, pos=6)
    wrong: list[AffineMaps] = [
        fit_affine_maps(model, tokens, source_layers=[0], **QUIET),
        fit_affine_maps(model, tokens, (0,), **QUIET),
        fit_affine_maps(model, tokens, site="resid_pre", **QUIET),
    ]
    for maps in wrong:
        with pytest.raises(ValueError, match="maps go from 'resid_post'"):
            compare_lenses(model, SOURCES, target=TARGET, maps=maps, **QUIET)


# Targets


def test_an_identity_prompt_repeats_words_and_ends_in_its_placeholder(reader: HookedTransformer) -> None:
    target = identity_prompt(reader, ["Paris", "Rome"])
    assert str(target) == "<|endoftext|>Paris->Paris\nRome->Rome\n«?»"
    assert reader.to_string(target.tokens[1:]) == "Paris->Paris\nRome->Rome\n?"
    assert target.pos == len(target.tokens) - 1
    other = identity_prompt(reader, ["A"], arrow=" = ", separator="; ", placeholder=" again", prepend_bos=False)
    assert str(other) == "A = A; « again»"
    drawn = str(identity_prompt(reader, n_words=4, seed=1)).removeprefix("<|endoftext|>")
    words = [line.split("->") for line in drawn.splitlines()[:-1]]
    assert len({one for one, _ in words}) == 4
    assert all(one == two and one.isalpha() and len(one) >= 3 for one, two in words)
    assert str(identity_prompt(reader, seed=1)) != str(identity_prompt(reader, seed=2))


@pytest.mark.usefixtures("no_type_checks")
def test_what_makes_no_identity_prompt_is_refused(reader: HookedTransformer) -> None:
    for arguments, message in (
        ({"words": []}, "words are"),
        ({"words": "cat"}, "words are"),
        ({"words": ["cat", ""]}, "words are"),
        ({"n_words": 0}, "n_words"),
        ({"n_words": 1000}, "vocabulary has"),
        ({"placeholder": "Rotterdam"}, "placeholder"),
        ({"placeholder": ""}, "placeholder"),
    ):
        with pytest.raises(ValueError, match=message):
            identity_prompt(reader, **arguments)
    with pytest.raises(ValueError, match="no tokenizer"):
        identity_prompt(tiny_model())


def test_a_target_prompt_brings_its_position(reader: HookedTransformer) -> None:
    last = identity_prompt(reader, ["Paris"])
    first = dataclasses.replace(last, pos=1)
    assert str(first).startswith("<|endoftext|>«")
    found = patchscope(reader, CORPUS, first, **QUIET)
    expected = patchscope(reader, CORPUS, last, target_pos=1, **QUIET)
    assert torch.equal(found.top_log_probs, expected.top_log_probs)
    assert not torch.allclose(found.top_log_probs, patchscope(reader, CORPUS, last, **QUIET).top_log_probs)


# Results and errors


def test_tables_rows_and_figures_say_what_the_numbers_say(reader: HookedTransformer) -> None:
    target = identity_prompt(reader, ["Paris"])
    grid = patchscope(reader, CORPUS, target, target_layers=(0, 1), answers=[5, 6, 7], **QUIET)
    rows = grid.rows()
    assert len(rows) == 4 * 3
    assert grid.answer_log_probs is not None
    assert rows[4]["answer_prob"] == pytest.approx(float(grid.answer_log_probs[1, 1].exp()))
    assert rows[4]["top"] == reader.to_single_str_token(int(grid.top_tokens[1, 1, 0]))
    assert rows[4]["source_token"] == reader.to_single_str_token(int(grid.source_tokens[1]))
    lines = grid.table(2).splitlines()
    assert lines[0].startswith("resid_post of '.' in '<|endoftext|>Paris")
    assert [line.split()[0] for line in lines[1:]] == ["source", "0", "1"]
    best = grid.top(1)[0]
    assert float(grid.answer_log_probs.max()) == float(
        grid.answer_log_probs[grid.cells.index((best.source_layer, best.target_layer)), best.prompt]
    )
    assert {one.prompt for one in grid.top(100, prompt=1)} == {1}
    figure = grid.figure(prompt=1)
    assert torch.allclose(torch.tensor(figure.data[0].z), grid.grid(grid.top_log_probs[:, 1, 0].exp()), atol=1e-12)
    assert (figure.layout.xaxis.title.text, len(figure.data[0].x)) == ("target layer", 2)
    last = len(target.tokens) - 1
    assert f"in the place of &#x27;?&#x27; at position {last} of the target" in figure.layout.title.text
    pairs = patchscope(reader, CORPUS, target, answers=[5, 6, 7], max_new_tokens=2, **QUIET)
    assert pairs.texts is not None
    assert repr(pairs.texts[1][0]) in str(pairs)
    assert f"{float(pairs.precision[0]):.2f}" in str(pairs).splitlines()[2]
    assert pairs.rows()[0]["text"] == pairs.texts[0][0]
    assert len(pairs.figure().data[0].x) == 3
    assert pairs.figure(1).layout.xaxis.title.text == "source token"


def test_a_result_refuses_what_it_does_not_have() -> None:
    found: Patchscope = patchscope(tiny_model(), SOURCES, TARGET, **QUIET)
    for call, message in (
        (lambda: found.precision, "no answers"),
        (found.precision_interval, "no answers"),
        (lambda: found.top(0), "k is at least"),
        (lambda: found.table(3), "no prompt 3"),
        (lambda: found.figure(-1), "no prompt -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "attn_out"}, "site is one of"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 21}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 100}, "n_ctx|context|positions"),
        ({"batch_size": 0}, "batch_size"),
        ({"target_pos": 6}, "target_pos 6"),
        ({"target_prompt": SOURCES}, "one prompt"),
        ({"target_prompt": torch.tensor([20])}, "0-19"),
        ({"source_pos": 4}, "positions 0-3"),
        ({"source_pos": [[0, 1], [0], [1]]}, "one state of each prompt"),
        ({"source_layers": [2]}, "no layer 2"),
        ({"target_layers": []}, "no layers"),
        ({"answers": [1, 2]}, "3 prompts"),
        ({"answers": 20}, "0-19"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"source_prompts": SOURCES, "target_prompt": TARGET, **QUIET, **arguments}
    with pytest.raises(ValueError, match=message):
        patchscope(tiny_model(), **given)


def test_models_that_do_not_predict_the_next_token_are_refused() -> None:
    model = tiny_model(attention_dir="bidirectional")
    with pytest.raises(ValueError, match="bidirectional"):
        patchscope(model, SOURCES, TARGET, **QUIET)
    with pytest.raises(ValueError, match="bidirectional"):
        compare_lenses(model, SOURCES, target=TARGET, **QUIET)
