"""Maximal examples equal a search through all activations in plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig, UnknownHookError, plotting
from hooked_lm.examples import MaxActivating, max_activating
from hooked_lm.examples.highest import Highest
from tests.helpers import CORPUS, VOCAB, randomise_, tiny_config, tiny_model, tiny_tokenizer

TEXTS = [*CORPUS, "Rome.", "again and again and again", "John gave Mary a drink.", "The capital, the capital of Rome:"]


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    """Reads text; float64, so that equal inputs in batches of any shape give activations in one order."""
    cfg = tiny_config(n_ctx=40, d_vocab=VOCAB, act_fn="relu")
    return randomise_(HookedTransformer(cfg, tiny_tokenizer()))  # type: ignore[return-value]


def rows(n: int = 9) -> list[list[int]]:
    """Rows of 1 to 12 tokens. No two begin alike, so that no two tokens have equal activations."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, (n,), generator=generator).tolist()
    return [
        [first, *torch.randint(20, (length,), generator=generator).tolist()] for first, length in enumerate(lengths)
    ]


Found = tuple[float, int, int]


def in_loops(model: HookedTransformer, corpus: list[Any], site: str, unit: Any, one_per_text: bool) -> list[Found]:
    """Each text by itself: (value, text, position) of every token but BOS, the highest first, then in order."""
    found: list[Found] = []
    for number, text in enumerate(corpus):
        tokens = model.to_tokens(text) if isinstance(text, str) else torch.tensor([text])
        _, cache = model.run_with_cache(tokens)
        values = [float(unit(cache[site][0, pos])) for pos in range(tokens.shape[1])]
        bos = None if model.tokenizer is None else model.tokenizer.bos_token_id
        there = [(value, number, pos) for pos, value in enumerate(values) if int(tokens[0, pos]) != bos]
        found += sorted(there, key=lambda one: -one[0])[:1] if one_per_text else there
    return sorted(found, key=lambda one: -one[0])


def of(result: MaxActivating, unit: int) -> list[Found]:
    return [(one.value, one.text, one.pos) for one in result.top(unit=unit)]


def assert_found(got: list[Found], expected: list[Found]) -> None:
    assert [one[1:] for one in got] == [one[1:] for one in expected]
    assert [one[0] for one in got] == pytest.approx([one[0] for one in expected], abs=1e-9)


@pytest.mark.parametrize("one_per_text", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_features_are_found_as_loops_find_them(model: HookedTransformer, batch_size: int, one_per_text: bool) -> None:
    site, k = "blocks.1.mlp.hook_post", 6
    how: dict[str, Any] = {"k": k, "one_per_text": one_per_text, "batch_size": batch_size, "verbose": False}
    result = max_activating(model, TEXTS, ("post", 1), **how)
    assert len(result.units) == model.cfg.d_mlp
    for unit in range(0, len(result.units), 5):
        expected = in_loops(model, TEXTS, site, lambda x, at=unit: x[at], one_per_text)[:k]
        if expected[-1][0] > 0:  # many zeros of a ReLU are equal; see the test of ties
            assert_found(of(result, unit), expected)


def test_rows_of_tokens_of_any_lengths_are_read() -> None:
    model, corpus = tiny_model(), rows()
    for site in ("blocks.0.hook_resid_mid", "blocks.1.hook_attn_out", "hook_embed", "unembed.hook_out"):
        result = max_activating(model, corpus, site, features=[3, 1], k=5, batch_size=4, verbose=False)
        assert result.units == ("feature 3", "feature 1")
        for index, feature in enumerate((3, 1)):
            expected = in_loops(model, corpus, site, lambda x, at=feature: x[at], False)[:5]
            if site != "hook_embed":  # equal tokens have equal embeddings
                assert_found(of(result, index), expected)
            assert [one[0] for one in of(result, index)] == pytest.approx([one[0] for one in expected])
    assert result.n_tokens == sum(map(len, corpus))
    assert result.n_texts == len(corpus)


def test_rows_may_be_tensors_arrays_or_one_tensor() -> None:
    model = tiny_model()
    corpus = torch.stack([torch.arange(6), torch.arange(6) + 9, torch.tensor([5, 3, 1, 2, 4, 0])])
    expected = max_activating(model, corpus.tolist(), ("post", 0), k=4, verbose=False)
    for given in (corpus, list(corpus), (row.numpy() for row in corpus), (tuple(row) for row in corpus.tolist())):
        got = max_activating(model, given, ("post", 0), k=4, verbose=False)
        assert torch.equal(got.texts, expected.texts)
        assert torch.equal(got.positions, expected.positions)
        assert torch.equal(got.context_tokens, expected.context_tokens)


def test_heads_are_found_by_their_norm_an_entry_or_a_direction() -> None:
    model, corpus, site = tiny_model(), rows(), "blocks.1.attn.hook_z"
    direction = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"k": 4, "batch_size": 4, "verbose": False}
    whole = max_activating(model, corpus, ("z", 1), **how)
    entries = max_activating(model, corpus, ("z", 1), heads=[2, 0], features=3, **how)
    along = max_activating(model, corpus, ("z", 1), heads=1, direction=direction, **how)
    assert whole.units == ("head 0", "head 1", "head 2")
    assert entries.units == ("head 2 feature 3", "head 0 feature 3")
    assert along.units == ("head 1 direction 0", "head 1 direction 1")
    for head in range(3):
        assert_found(of(whole, head), in_loops(model, corpus, site, lambda x, h=head: x[h].norm(), False)[:4])
    for index, head in enumerate((2, 0)):
        assert_found(of(entries, index), in_loops(model, corpus, site, lambda x, h=head: x[h, 3], False)[:4])
    for index in range(2):
        expected = in_loops(model, corpus, site, lambda x, at=index: x[1] @ direction[at], False)[:4]
        assert_found(of(along, index), expected)


def test_a_direction_may_be_one_and_in_another_precision() -> None:
    model, corpus = tiny_model(dtype=torch.float32), rows()
    direction = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = max_activating(model, corpus, "blocks.0.hook_resid_post", direction=direction, k=3, verbose=False)
    expected = in_loops(model, corpus, "blocks.0.hook_resid_post", lambda x: x @ direction.float(), False)[:3]
    assert result.units == ("direction 0",)
    assert [one[1:] for one in of(result, 0)] == [one[1:] for one in expected]


def test_half_precision_is_read() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    result = max_activating(model, rows(), ("post", 0), features=0, verbose=False)
    assert result.values.dtype == torch.float32
    assert bool((result.values.diff() <= 0).all())


def constant(model: HookedTransformer, site: str, values: list[float]) -> Any:
    """A context in which a site's first feature has these values by position."""

    def put(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[..., 0] = torch.tensor(values, dtype=x.dtype)[: x.shape[1]]
        return x

    return model.hooks(fwd_hooks=[(site, put)])


def test_of_equal_activations_the_first_in_the_corpus_are_kept() -> None:
    model, site = tiny_model(), "blocks.0.hook_resid_post"
    corpus = [[1, 2, 3], [4, 5], [6, 7, 8]]
    with constant(model, site, [1.0, 2.0, 1.0]):
        for batch_size in (1, 2, 3):
            how: dict[str, Any] = {"features": 0, "batch_size": batch_size, "verbose": False}
            tied = max_activating(model, corpus, site, k=5, **how)
            assert of(tied, 0) == [(2.0, 0, 1), (2.0, 1, 1), (2.0, 2, 1), (1.0, 0, 0), (1.0, 0, 2)]
            single = max_activating(model, corpus, site, k=2, one_per_text=True, **how)
            assert of(single, 0) == [(2.0, 0, 1), (2.0, 1, 1)]


@pytest.mark.parametrize("trial", range(20))
def test_many_equal_activations_in_batches_of_any_shape_are_kept_in_order(trial: int) -> None:
    """Four values only, and places that do not count: what is kept against a plain sort of all."""
    random = torch.Generator().manual_seed(trial)
    k, one_per_text = 1 + trial % 6, bool(trial % 2)
    highest, n_texts = Highest(k, 2, one_per_text), 0
    found: list[list[Found]] = [[] for _ in range(4)]
    for _ in range(5):
        batch, pos = torch.randint(1, 6, (2,), generator=random).tolist()
        values = torch.randint(4, (batch, pos, 4), generator=random).double()
        mask, tokens = (torch.randint(2, (batch, pos), generator=random) for _ in range(2))
        highest.add(values, tokens, mask, mask.bool(), list(range(n_texts, n_texts + batch)))
        for unit, row in itertools.product(range(4), range(batch)):
            there = [(float(values[row, at, unit]), n_texts + row, at) for at in range(pos) if mask[row, at]]
            found[unit] += sorted(there, key=lambda one: -one[0])[:1] if one_per_text else there
        n_texts += batch
    for unit in range(4):
        kept = zip(*(field[unit].tolist() for field in highest.fields[:3]), strict=True)
        expected = sorted(found[unit], key=lambda one: -one[0])[:k]
        assert [one for one in kept if one[1] >= 0] == expected


def test_bos_and_padding_do_not_count_even_where_they_are_the_strongest(model: HookedTransformer) -> None:
    site = "blocks.0.hook_resid_post"
    texts = ["Rome.", CORPUS[0]]
    shortest = model.to_tokens(texts[0]).shape[1]

    def by_position(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[..., 0] = torch.arange(x.shape[1], dtype=x.dtype)
        x[:, 0, 0] = 1e6
        x[0, shortest:, 0] = 1e5
        return x

    with model.hooks(fwd_hooks=[(site, by_position)]):
        result = max_activating(model, texts, site, features=0, k=1000, context=3, verbose=False)
    longest = model.to_tokens(texts[1]).shape[1]
    found = of(result, 0)
    assert len(found) == result.n_tokens == shortest - 1 + longest - 1
    assert max(value for value, text, _ in found if text == 0) == shortest - 1
    assert found[0] == (longest - 1, 1, longest - 1)
    assert not any(math.isinf(value) for value, _, _ in found)
    assert result.values.shape == (1, 1000)
    first = next(one for one in result.top() if (one.text, one.pos) == (0, 1))
    assert (first.strings[0], first.index) == (model.tokenizer.bos_token, 1)
    assert math.isnan(first.activations[0])


def test_bos_in_the_middle_of_a_row_does_not_count(model: HookedTransformer) -> None:
    bos = model.tokenizer.bos_token_id
    result = max_activating(model, [[bos, 5, bos, 6]], ("post", 0), features=0, k=9, verbose=False)
    assert sorted(one.pos for one in result.top()) == [1, 3]


def test_the_context_is_what_stands_around_the_token(model: HookedTransformer) -> None:
    context = 2
    result = max_activating(model, TEXTS, ("post", 0), features=7, k=8, context=context, batch_size=3, verbose=False)
    for one in result.top():
        tokens = model.to_tokens(TEXTS[one.text])[0].tolist()
        start = max(one.pos - context, 0)
        assert list(one.tokens) == tokens[start : one.pos + context + 1]
        assert one.tokens[one.index] == tokens[one.pos]
        assert list(one.strings) == [model.to_single_str_token(token) for token in one.tokens]
        _, cache = model.run_with_cache(TEXTS[one.text])
        values = cache["post", 0][0, start : one.pos + context + 1, 7].tolist()
        real = [i for i, token in enumerate(one.tokens) if token != model.tokenizer.bos_token_id]
        assert [one.activations[i] for i in real] == pytest.approx([values[i] for i in real], abs=1e-9)
        assert one.activations[one.index] == one.value


def test_a_corpus_is_read_lazily_a_batch_at_a_time() -> None:
    model, drawn, at_runs = tiny_model(), list[int](), list[int]()

    def endless() -> Iterator[list[int]]:
        for number in range(10):
            drawn.append(number)
            yield [number, 1, 2]

    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: at_runs.append(len(drawn)))]):
        max_activating(model, endless(), ("post", 0), batch_size=4, verbose=False)
    assert at_runs == [4, 8, 10]


def test_no_layer_after_the_site_is_run() -> None:
    model = tiny_model()

    def never(x: Tensor, hook: Any) -> None:
        raise AssertionError(hook.name)

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", never)]):
        max_activating(model, rows(), ("post", 0), verbose=False)


def test_empty_texts_are_counted_and_skipped(model: HookedTransformer) -> None:
    result = max_activating(model, ["", "Rome.", "", "Paris"], ("post", 0), features=0, batch_size=2, verbose=False)
    assert {one.text for one in result.top()} == {1, 3}
    assert result.n_texts == 4


def test_longer_texts_can_be_cut(model: HookedTransformer) -> None:
    long = " ".join(CORPUS)
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens, more than this model's n_ctx of 40: .*max_tokens=40"):
        max_activating(model, ["Rome.", long], ("post", 0), verbose=False)
    result = max_activating(model, ["Rome.", long], ("post", 0), features=0, k=99, max_tokens=10, verbose=False)
    assert max(one.pos for one in result.top()) == 9


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("corpus", "site", "how", "error", "message"),
    [
        ("one text", ("post", 0), {}, TypeError, "a corpus is an iterable of texts, and this is one text"),
        ([[1, 2], "text"], ("post", 0), {}, TypeError, "has texts, or rows of tokens; this one has list, str"),
        ([[1.5]], ("post", 0), {}, TypeError, "rows of tokens; this one has list"),
        ([[]], ("post", 0), {}, ValueError, "no tokens: it has 1 texts, all of them empty"),
        ([], ("post", 0), {}, ValueError, "no tokens: it has 0 texts"),
        ([[1]], ("pattern", 0), {}, ValueError, r"axes 'batch head query key'.*\[batch pos width\]"),
        ([[1]], ("post", 0), {"heads": 0}, ValueError, "there are no heads to choose"),
        ([[1]], ("post", 0), {"features": 48}, ValueError, "has features 0-47: there is no feature 48"),
        ([[1]], ("z", 0), {"heads": [0, 3]}, ValueError, "has heads 0-2: there is no head 3"),
        ([[1]], ("z", 0), {"heads": []}, ValueError, "an integer or several that differ"),
        ([[1]], ("post", 0), {"features": [1, 1]}, ValueError, "an integer or several that differ"),
        ([[1]], ("post", 0), {"direction": torch.ones(5)}, ValueError, "direction has width 5, and .* 48"),
        ([[1]], ("post", 0), {"direction": torch.ones(5), "features": 1}, ValueError, "give one of them"),
        ([[1]], ("post", 0), {"direction": torch.ones(48).long()}, ValueError, "of floats; got torch.int64"),
        ([[1]], ("post", 0), {"k": 0}, ValueError, "k is 1 or more, got 0"),
        ([[1]], ("post", 0), {"context": -1}, ValueError, "context is 0 or more"),
        ([[1]], ("post", 0), {"batch_size": 0}, ValueError, "batch_size is 1 or more"),
        ([[1]], ("post", 0), {"max_tokens": 0}, ValueError, "max_tokens is 1 or more"),
        ([[1]], "blocks.0.hook_resid_pst", {}, UnknownHookError, "did you mean 'blocks.0.hook_resid_post'"),
    ],
)
def test_what_cannot_be_searched_raises(corpus: Any, site: Any, how: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        max_activating(tiny_model(), corpus, site, verbose=False, **how)


def test_padded_rows_are_refused(model: HookedTransformer) -> None:
    pad = model.tokenizer.pad_token_id
    for row in ([5, 6, pad, pad], [pad, pad, 5, 6]):
        with pytest.raises(ValueError, match="text 1 begins or ends with padding tokens"):
            max_activating(model, [[5, 6], row], ("post", 0), verbose=False)
    max_activating(model, [[pad, 5, 6, pad]], ("post", 0), verbose=False)


def test_activations_that_are_not_finite_raise_and_name_the_text() -> None:
    model, site = tiny_model(), "blocks.0.hook_resid_post"
    with constant(model, site, [0.0, 1.0, float("nan")]), pytest.raises(ValueError, match="text 1 has activations"):
        max_activating(model, [[1, 2], [1, 2, 3]], site, features=0, verbose=False)


# The result


def test_results_are_shown_as_a_table_and_as_rows(model: HookedTransformer) -> None:
    result = max_activating(model, TEXTS, ("post", 1), features=[4, 9], k=3, context=2, verbose=False)
    best = result.top(1)[0]
    marked = "".join(best.strings[: best.index]) + f"«{best.strings[best.index]}»"
    lines = result.table(2).splitlines()
    assert lines[0] == "feature 4 at blocks.1.mlp.hook_post"
    assert len(lines) == 3
    assert f"{best.value:.3f}" in lines[1]
    assert marked in lines[1]
    assert str(result) == result.table()
    assert result.table(unit="feature 9") == result.table(unit=1) != result.table()
    assert [(row["unit"], row["rank"]) for row in result.rows()[2:4]] == [("feature 4", 2), ("feature 9", 0)]
    for wrong in ("feature 5", 2, -1, True):
        with pytest.raises(ValueError, match=r"no unit .*: there are 0-1, such as 'feature 9'"):
            result.top(unit=wrong)
    with pytest.raises(ValueError, match="k is at least 1"):
        result.top(0)


def test_line_breaks_in_a_context_do_not_break_the_line(model: HookedTransformer) -> None:
    result = max_activating(model, ["Rome.\nParis"], ("post", 0), features=0, k=1, context=20, verbose=False)
    assert len(result.table().splitlines()) == 2
    assert "↵" in result.table()


def test_the_figure_has_a_line_for_each_example(model: HookedTransformer) -> None:
    result = max_activating(model, TEXTS, ("post", 1), features=4, k=3, context=2, verbose=False)
    figure = result.figure()
    assert isinstance(figure, plotting.HtmlFigure)
    assert figure.title == "feature 4 at blocks.1.mlp.hook_post"
    page = figure.html()
    for one in result.top():
        assert f"activation {one.value:.4g}" in page
    assert page.count('class="token"') == sum(len(one.tokens) + 1 for one in result.top()) - 1


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    cfg: HookedTransformerConfig = tiny_config()
    model: HookedTransformer = randomise_(HookedTransformer(cfg))  # type: ignore[assignment]
    result = max_activating(model, [[5, 6]], ("post", 0), features=0, k=2, verbose=False)
    assert result.strings is None
    assert sorted(result.top()[0].strings) == ["5", "6"]
