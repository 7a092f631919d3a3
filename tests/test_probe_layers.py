"""probe_layers reads the activations of the tokens asked for, and its layers differ where the model's do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, plotting
from hooked_lm.probing import LayerProbes, TokensAt, activations_at, probe_activations, probe_layers
from tests.helpers import CORPUS, VOCAB, counted, randomise_, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

TEXTS = [*CORPUS, "Rome.", "John gave a drink to Mary.", "again and again"]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return randomise_(HookedTransformer(tiny_config(n_ctx=40, d_vocab=VOCAB), tiny_tokenizer()))  # type: ignore[return-value]


def quiet(**how: Any) -> dict[str, Any]:
    return {"verbose": False, **how}


# Which activations


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "z", "post", "blocks.{layer}.ln1.hook_normalized"])
@pytest.mark.parametrize("pos", [-1, 0, 2, [-1, 3, -3, 1, 0, -2], [[0, -1], [3], [-2, 5], [1], [], [2, -1, 4]]])
def test_each_activation_is_the_one_that_its_prompt_has_alone(model: HookedTransformer, site: str, pos: Any) -> None:
    tokens = TokensAt.of(model, TEXTS, pos)
    expected: list[list[Tensor]] = [[], []]
    read: list[int] = []
    for index, text in enumerate(TEXTS):
        _, cache = model.run_with_cache(text)
        wanted = pos if isinstance(pos, int) else pos[index]
        for one in [wanted] if isinstance(wanted, int) else wanted:
            read.append(int(model.to_tokens(text)[0, one]))
            for layer in range(2):
                full = site.replace("{layer}", str(layer))
                values = cache[full] if "." in site else cache[site, layer]
                expected[layer].append(values[0, one].flatten())
    for batch_size in (1, 4, 32):
        got = activations_at(model, tokens, site, batch_size=batch_size, verbose=False)
        torch.testing.assert_close(got, torch.stack([torch.stack(one) for one in expected]))
    assert tokens.tokens.tolist() == read


def test_layers_are_read_in_the_order_asked_for_and_no_later_one_is_run() -> None:
    model, prompts = tiny_model(n_layers=3), tiny_tokens(batch=3)
    tokens = TokensAt.of(model, prompts)
    whole = activations_at(model, tokens, verbose=False)

    def never(x: Tensor, hook: Any) -> None:
        raise AssertionError(hook.name)

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", never)]):
        some = activations_at(model, tokens, layers=[1, 0], verbose=False)
    torch.testing.assert_close(some, whole[[1, 0]])


def test_the_model_runs_once_for_each_batch_and_keeps_only_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(n_layers=3), tiny_tokens(batch=10)
    calls = counted(monkeypatch, HookedTransformer, "forward")
    got = activations_at(model, TokensAt.of(model, prompts, -2), batch_size=4, verbose=False)
    assert len(calls) == 3
    assert got.shape == (3, 10, 12)


def test_a_batch_is_no_longer_than_its_longest_prompt(
    monkeypatch: pytest.MonkeyPatch, model: HookedTransformer
) -> None:
    texts = ["Rome.", "Paris", CORPUS[0], CORPUS[1]]
    calls = counted(monkeypatch, HookedTransformer, "forward")
    activations_at(model, TokensAt.of(model, texts), batch_size=2, verbose=False)
    lengths = [model.to_tokens(text).shape[1] for text in texts]
    assert [call[1].shape[1] for call in calls] == [max(lengths[:2]), max(lengths[2:])]


def test_padding_of_tokens_is_left_out_by_their_mask() -> None:
    model, prompts = tiny_model(), tiny_tokens(batch=2, pos=7)
    mask = torch.ones_like(prompts)
    mask[0, 4:] = 0
    got = activations_at(model, TokensAt.of(model, prompts, -1, mask), verbose=False)
    _, cache = model.run_with_cache(prompts[:1, :4])
    torch.testing.assert_close(got[:, 0], torch.stack([cache["resid_post", layer][0, -1] for layer in range(2)]))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("pos", "message"),
    [
        (7, "prompt 0 has 7 tokens, positions 0-6 or -7 to -1; got pos 7"),
        ([0, -8], "prompt 1 has 7 tokens"),
        ([0], "for each of the 2 prompts"),
        ([0, 1.5], "for each of the 2 prompts"),
        ([[0, -7], [1]], r"prompt 0 has a position twice in \[0, -7\]"),
        ([[], []], "no positions to read"),
    ],
)
def test_positions_that_are_not_there_raise(pos: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokensAt.of(tiny_model(), tiny_tokens(batch=2), pos)


@pytest.mark.parametrize(
    ("site", "layers", "error", "message"),
    [
        ("pattern", None, ValueError, r"axes 'batch head query key': a probe reads sites \[batch pos ...\]"),
        ("blocks.{layer}.hook_resid_pst", None, UnknownHookError, "did you mean"),
        ("resid_post", [2], ValueError, "no layer 2"),
    ],
)
def test_sites_that_no_probe_reads_raise(site: str, layers: Any, error: Any, message: str) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        activations_at(model, TokensAt.of(model, tiny_tokens()), site, layers, verbose=False)


# The probes


@contextmanager
def planting(model: HookedTransformer, layer: int, direction: Tensor) -> Iterator[None]:
    """From a layer on, the last token's stream says whether the second token's number is even."""
    seen: list[Tensor] = []

    def look(tokens: Tensor, hook: Any) -> None:
        seen[:] = [tokens]

    def write(stream: Tensor, hook: Any) -> Tensor:
        sign = 1 - 2 * (seen[0][:, 1] % 2)
        stream = stream.clone()
        stream[:, -1] += sign[:, None] * direction.to(stream)
        return stream

    with model.hooks(fwd_hooks=[("hook_tokens", look), (f"blocks.{layer}.hook_resid_pre", write)]):
        yield


def test_a_label_is_found_from_the_layer_on_that_writes_it() -> None:
    """The stream before that layer depends on the last token alone: the model has no attention to speak of."""
    model = tiny_model(n_layers=4)
    for block in model.blocks:
        block.attn.W_O.data.zero_()
    prompts = tiny_tokens(batch=400, pos=4)
    labels = ["even" if token % 2 == 0 else "odd" for token in prompts[:, 1].tolist()]
    direction = 30 * torch.nn.functional.normalize(torch.randn(12, generator=torch.Generator().manual_seed(0)), dim=0)
    with planting(model, 2, direction):
        found = probe_layers(model, prompts, labels, batch_size=64, types="token", **quiet())
    early, late = found.accuracy[:2], found.accuracy[2:]
    assert bool((early < 0.65).all())
    assert bool((late > 0.98).all())
    assert [result.above_majority for result in found.results] == [False, False, True, True]
    assert found.top(2) == [(2, found[2].accuracy), (3, found[3].accuracy)]
    assert found.selectivity is not None
    # Twenty last tokens in twelve dimensions: what is learned by heart is less than what is there.
    assert float(found.selectivity[2]) > 0.1
    assert found[2].probe.classes == ("even", "odd")
    assert float(found[2].probe.direction.float() @ -direction) > 20


def test_all_layers_have_the_held_out_prompts_and_control_tasks_of_one_layer() -> None:
    model, prompts = tiny_model(), tiny_tokens(batch=80)
    labels, types = prompts[:, 0] % 3, prompts[:, -1]
    how: dict[str, Any] = {"kind": "linear", "l2": 0.1, "n_controls": 2, "test_share": 0.3, "seed": 5}
    found = probe_layers(model, prompts, labels, types="token", **how, **quiet())
    activations = activations_at(model, TokensAt.of(model, prompts), verbose=False)
    for layer in range(2):
        alone = probe_activations(activations[layer], labels, types=types, **how)
        assert found[layer].__dict__.keys() == alone.__dict__.keys()
        for key, value in alone.__dict__.items():
            if key != "probe":
                assert getattr(found[layer], key) == value, key
        assert torch.equal(found[layer].probe.weights, alone.probe.weights)


def held_out_prompts(model: HookedTransformer, prompts: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    """The division that `probe_layers` makes."""
    from hooked_lm.probing import layers

    divided = []
    original = layers.evaluate_probe

    def watching(activations: Tensor, examples: Any, *rest: Any) -> Any:
        divided.append(examples)
        return original(activations, examples, *rest)

    monkeypatch.setattr(layers, "evaluate_probe", watching)
    probe_layers(model, prompts, **how, **quiet())
    return divided[0]


def test_equal_prompts_and_all_positions_of_a_prompt_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompts = tiny_tokens(batch=30)[torch.arange(60) % 30]
    pos, labels = [[1, 3, -1]] * 60, [[0, 1, 0]] * 60
    examples = held_out_prompts(model, prompts, monkeypatch, labels=labels, pos=pos)
    assert len(examples) == 180
    by_prompt = examples.held_out.reshape(2, 30, 3)
    assert bool((by_prompt == by_prompt[:1, :, :1]).all())
    assert examples.labels.tolist() == [0, 1, 0] * 60


def test_prompts_of_a_group_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [index % 7 for index in range(60)]
    examples = held_out_prompts(
        tiny_model(), tiny_tokens(batch=60), monkeypatch, labels=torch.arange(60) % 2, groups=groups
    )
    sides = [{bool(out) for out in examples.held_out[one::7]} for one in range(7)]
    assert all(len(side) == 1 for side in sides)
    assert {True} in sides


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"labels": [0, 1]}, "labels are one for each of the 12 prompts, got 2"),
        ({"labels": "abababababab"}, "labels are one for each of the 12 prompts"),
        ({"labels": [0, 1] * 6, "groups": [1]}, "groups are one for each of the 12 prompts, got 1"),
        ({"labels": [0, 1] * 6, "types": [1]}, "types are one for each of the 12 prompts, got 1"),
        ({"labels": [[0, 1]] * 12}, "prompt 0 has 1 positions and 2 labels"),
        ({"labels": [0, 1] * 6, "kind": "mlp"}, "'linear' or 'logistic'"),
        ({"labels": [0, 1] * 6, "batch_size": 0}, "batch_size is an integer of at least 1"),
    ],
)
def test_what_does_not_fit_the_prompts_raises(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe_layers(tiny_model(), tiny_tokens(batch=12), **how, **quiet())


# The result


@pytest.fixture(scope="module")
def found() -> LayerProbes:
    prompts = tiny_tokens(batch=80)
    return probe_layers(tiny_model(), prompts, prompts[:, -1] % 2, "mlp_out", types="token", **quiet())


def test_results_are_shown_as_a_table_and_as_rows(found: LayerProbes) -> None:
    lines = found.table().splitlines()
    assert lines[0].split() == ["layer", "accuracy", "interval", "majority", "selectivity"]
    assert len(lines) == 3
    assert lines[1].split()[:2] == ["0", f"{found[0].accuracy:.2f}"]
    assert f"{found[0].low:.2f} to {found[0].high:.2f}" in lines[1]
    assert len({len(line) for line in lines}) == 1
    assert str(found) == found.table()
    assert found.rows()[1]["layer"] == 1
    assert found.rows()[1]["selectivity"] == found[1].selectivity
    assert found.majority == found[0].majority
    with pytest.raises(KeyError, match="layer 2 was not probed: there are 0, 1"):
        _ = found[2]
    with pytest.raises(ValueError, match="k is at least 1"):
        found.top(0)


def test_without_types_nothing_is_said_of_selectivity() -> None:
    prompts = tiny_tokens(batch=40)
    found = probe_layers(tiny_model(), prompts, prompts[:, -1] % 2, layers=[-1], **quiet())
    assert found.layers == (1,)
    assert found.selectivity is None
    assert "selectivity" not in found.table()
    assert [trace.name for trace in found.figure().data] == ["accuracy"]


def test_the_figure_shows_accuracy_selectivity_and_the_majority(found: LayerProbes) -> None:
    figure = found.figure(title="Probes")
    assert isinstance(figure, plotting.Figure)
    curves = {trace.name: list(trace.y) for trace in figure.data}
    assert curves["accuracy"] == pytest.approx(found.accuracy.tolist())
    assert curves["on control tasks"] == pytest.approx([one.control_accuracy for one in found.results])
    assert found.selectivity is not None
    assert curves["selectivity"] == pytest.approx(found.selectivity.tolist())
    assert any(shape.y0 == found.majority for shape in figure.layout.shapes)
