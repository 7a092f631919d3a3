"""A head that was split in two is put together exactly; unlike heads are not, and the report says what that costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.surgery import merge_heads, suggest_merges
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens(3, 6)
MASK = torch.ones_like(TOKENS)
MASK[0, 4:] = 0
ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True}


def heads_model(**changes: Any) -> HookedTransformer:
    return tiny_model(**{"n_heads": 4, "d_head": 4, **changes})


@torch.no_grad()
def split(model: HookedTransformer, layer: int = 0, heads: tuple[int, ...] = (1, 3)) -> HookedTransformer:
    """Give heads one pattern, and OV circuits that take turns among the four dimensions of a head.

    Each head's own basis is another one, so that no entries of the two can be put side by side.
    """
    attn = model.blocks[layer].attn
    for turn, head in enumerate(heads):
        for name in ("W_Q", "W_K", "b_Q", "b_K"):
            weight = getattr(attn, name)
            weight[head] = weight[heads[0]]
        for dim in range(4):
            if dim % len(heads) != turn:
                attn.W_V[head, :, dim] = 0
        basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(head), dtype=torch.float64)).Q
        basis = basis.to(attn.W_V.dtype)
        attn.W_V[head], attn.b_V[head] = attn.W_V[head] @ basis, attn.b_V[head] @ basis
        attn.W_O[head] = basis.T @ attn.W_O[head]
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ROTARY,
        {**ROTARY, "use_qk_norm": True, "qk_norm_across_heads": True},
        {"norm_placement": "residual", "positional_embedding_type": "shortformer"},
        {"attn_types": ["local", "global"], "window_size": 2},
        {"normalization_type": "LNPre", "parallel_attn_mlp": True},
        {"attention_dir": "bidirectional"},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_head_that_was_split_is_put_together_exactly(changes: dict[str, Any]) -> None:
    model = split(heads_model(**changes))
    if changes.get("qk_norm_across_heads"):
        # The norm over all heads has a gain for each entry, and equal heads have equal ones.
        for norm in (model.blocks[0].attn.q_norm, model.blocks[0].attn.k_norm):
            norm.w.view(4, 4)[3] = norm.w.view(4, 4)[1]
    before = model(TOKENS)
    found = merge_heads(model, 0, [[1, 3]], TOKENS, verbose=False)
    (group,) = found.groups
    assert (found.model(TOKENS) - before).abs().max() < 1e-10
    assert torch.equal(model(TOKENS), before)
    assert (group.heads, group.kept, group.freed) == ((1, 3), 1, (3,))
    assert group.lost == pytest.approx(0, abs=1e-20)
    assert group.pattern_error == pytest.approx(0, abs=1e-20)
    assert found.cost.kl == pytest.approx(0, abs=1e-12)
    assert found.ablated.kl > 1e-4
    attn = found.model.blocks[0].attn
    for weight in (attn.W_O[3], attn.W_V[3], attn.b_V[3], attn.b_V[1]):
        assert not weight.any()
    # The merged head's basis is that of its singular values.
    assert (attn.W_O[1] @ attn.W_O[1].T - torch.eye(4, dtype=torch.float64)).abs().max() < 1e-10


@torch.no_grad()
def test_three_heads_of_one_layer_and_two_groups() -> None:
    model = split(split(heads_model(n_heads=6), 1, (0, 2, 5)), 1, (1, 4))
    found = merge_heads(model, -1, [(0, 2, 5), (1, 4)], TOKENS, verbose=False)
    assert found.layer == 1
    assert (found.model(TOKENS) - model(TOKENS)).abs().max() < 1e-10
    assert [group.freed for group in found.groups] == [(2, 5), (4,)]
    assert {head for head in range(6) if not found.model.blocks[1].attn.W_O[head].any()} == {2, 4, 5}


@torch.no_grad()
def test_rank_decides_how_much_is_lost() -> None:
    model = heads_model()
    attn = model.blocks[0].attn
    for name in ("W_Q", "W_K", "b_Q", "b_K"):
        getattr(attn, name)[3] = getattr(attn, name)[1]
    found = merge_heads(model, 0, [[1, 3]], TOKENS, verbose=False)
    total = attn.W_V[1] @ attn.W_O[1] + attn.W_V[3] @ attn.W_O[3]
    values = torch.linalg.svdvals(total) ** 2
    assert found.groups[0].lost == pytest.approx(float(values[4:].sum() / values.sum()))
    assert found.groups[0].lost > 0.01
    # No matrix of rank 4 is nearer.
    new = found.model.blocks[0].attn
    assert float((new.W_V[1] @ new.W_O[1] - total).square().sum()) == pytest.approx(float(values[4:].sum()))
    assert found.cost.kl > 0


@torch.no_grad()
def test_costs_equal_those_of_plain_runs() -> None:
    model = heads_model()
    found = merge_heads(model, 0, [[0, 2], [3, 1]], TOKENS, attention_mask=MASK, batch_size=2, verbose=False)
    base = model(TOKENS, attention_mask=MASK).log_softmax(-1)

    def divergence(logits: Tensor) -> float:
        return float((base.exp() * (base - logits.log_softmax(-1))).sum(-1)[MASK.bool()].mean())

    def ablated(heads: tuple[int, ...]) -> tuple[float, float]:
        def zero(x: Tensor, hook: Any) -> Tensor:
            x[:, :, list(heads)] = 0
            return x

        logits, loss = model.run_with_hooks(
            TOKENS, attention_mask=MASK, return_type="both", fwd_hooks=[("blocks.0.attn.hook_z", zero)]
        )
        return divergence(logits), float(loss)

    assert found.loss == pytest.approx(float(model(TOKENS, attention_mask=MASK, return_type="loss")))
    logits, loss = found.model(TOKENS, attention_mask=MASK, return_type="both")
    assert found.cost == pytest.approx((divergence(logits), float(loss)))
    assert found.ablated == pytest.approx(ablated(tuple(head for group in found.groups for head in group.freed)))
    for group in found.groups:
        alone = merge_heads(model, 0, [group.heads], TOKENS, attention_mask=MASK, verbose=False)
        assert alone.cost == pytest.approx(group.cost)
        assert alone.groups[0][:2] == group[:2]
        assert alone.groups[0][2:4] == pytest.approx(group[2:4])
        assert group.ablated == pytest.approx(ablated(group.freed))
        assert group.cost.kl > 1e-4
    assert found.n_tokens == int(MASK.sum())
    assert found.top(1)[0] == min(found.groups, key=lambda group: group.cost.kl)


@torch.no_grad()
def test_the_kept_head_is_the_one_whose_pattern_moves_the_groups_output_least() -> None:
    model = heads_model()
    model.blocks[0].attn.W_O[2] *= 10  # the group's output is nearly this head's
    (group,) = merge_heads(model, 0, [[0, 2]], TOKENS, attention_mask=MASK, verbose=False).groups
    assert group.kept == 2
    _, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    pattern, v, W_O = cache["pattern", 0], cache["v", 0], model.blocks[0].attn.W_O
    errors = {}
    written = sum(pattern[:, head] @ v[:, :, head] @ W_O[head] for head in (0, 2))
    for kept in (0, 2):
        other = sum(pattern[:, kept] @ v[:, :, head] @ W_O[head] for head in (0, 2))
        difference, size = (one[MASK.bool()].square().sum() for one in (other - written, written))
        errors[kept] = float(difference / size)
    assert group.pattern_error == pytest.approx(errors[2])
    assert errors[2] < errors[0]


@torch.no_grad()
def test_grouped_heads_are_merged_within_their_group_and_lose_nothing() -> None:
    model = heads_model(**ROTARY, n_key_value_heads=2)
    attn = model.blocks[0].attn
    attn.W_Q[3], attn.b_Q[3] = attn.W_Q[2], attn.b_Q[2]
    found = merge_heads(model, 0, [[2, 3]], TOKENS, verbose=False)
    assert (found.model(TOKENS) - model(TOKENS)).abs().max() < 1e-10
    assert found.groups[0].lost == 0
    assert torch.equal(found.model.blocks[0].attn.W_V, attn.W_V)
    with pytest.raises(ValueError, match=r"heads 1, 2 do not share .* such as \[0, 1\]"):
        merge_heads(model, 0, [[1, 2]], TOKENS, verbose=False)
    pairs = [pair[:3] for pair in suggest_merges(model, TOKENS, verbose=False).pairs]
    assert sorted(pairs) == [(layer, first, first + 1) for layer in (0, 1) for first in (0, 2)]
    best = suggest_merges(model, TOKENS, [0], verbose=False).top(1)[0]
    assert best[:3] == (0, 2, 3)
    assert best.score == pytest.approx(1)


@torch.no_grad()
def test_the_merged_model_works_in_low_precision_and_after_it_is_saved(tmp_path: Any) -> None:
    model = split(heads_model(dtype=torch.float32))
    found = merge_heads(model, 0, [[1, 3]], TOKENS, verbose=False)
    assert (found.model(TOKENS) - model(TOKENS)).abs().max() < 1e-4
    found.model.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert torch.equal(again(TOKENS), found.model(TOKENS))
    half = split(heads_model(dtype=torch.bfloat16))
    assert merge_heads(half, 0, [[1, 3]], TOKENS, verbose=False).cost.kl < 0.01


# Suggestions


@torch.no_grad()
def test_a_split_head_is_suggested_first_and_every_number_is_that_of_a_plain_loop() -> None:
    model = split(heads_model())
    found = suggest_merges(model, TOKENS, attention_mask=MASK, batch_size=2, verbose=False)
    assert found.top(1)[0][:3] == (0, 1, 3)
    assert found.top(1)[0].score == pytest.approx(1)
    assert found.pairs[1].score < 0.9
    assert len(found.pairs) == 12
    _, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    for pair in found.pairs:
        pattern, attn = cache["pattern", pair.layer], model.blocks[pair.layer].attn
        distances = [
            float((pattern[prompt, pair.first, query] - pattern[prompt, pair.second, query]).abs().sum() / 2)
            for prompt in range(3)
            for query in range(1, int(MASK[prompt].sum()))
        ]
        assert found.n_queries == len(distances)
        assert pair.pattern_similarity == pytest.approx(1 - sum(distances) / len(distances))
        first, second = (attn.W_V[head] @ attn.W_O[head] for head in (pair.first, pair.second))
        values = torch.linalg.svdvals(first + second) ** 2
        assert pair.lost == pytest.approx(float(values[4:].sum() / values.sum()), abs=1e-12)
        assert pair.ov_similarity == pytest.approx(float((first * second).sum() / first.norm() / second.norm()))
        assert pair.score == pytest.approx(pair.pattern_similarity * (1 - pair.lost))


@torch.no_grad()
def test_what_is_alike_costs_little_beside_what_is_not() -> None:
    model = split(heads_model(n_heads=5))
    found = suggest_merges(model, TOKENS, [0], verbose=False)
    costs = [
        merge_heads(model, 0, [pair[1:3]], TOKENS, verbose=False).cost.kl for pair in (found.pairs[0], found.pairs[-1])
    ]
    assert costs[0] < 1e-12
    assert costs[1] > 1e-4


@torch.no_grad()
def test_a_head_that_writes_nothing_has_no_direction() -> None:
    model = heads_model()
    model.blocks[0].attn.W_O[1] = 0.0
    model.blocks[0].attn.W_O[2] = 0.0
    pairs = {pair[1:3]: pair for pair in suggest_merges(model, TOKENS, [0], verbose=False).pairs}
    assert (pairs[0, 1].ov_similarity, pairs[0, 1].lost) == (0, pytest.approx(0, abs=1e-20))
    assert pairs[1, 2].lost == 0
    (group,) = merge_heads(model, 0, [[1, 2]], TOKENS, verbose=False).groups
    assert (group.lost, group.pattern_error) == (0, 0)
    assert group.cost.kl == pytest.approx(0, abs=1e-12)


def test_results_as_rows_text_and_figures() -> None:
    model = split(heads_model())
    pairs = suggest_merges(model, TOKENS, verbose=False)
    assert pairs.rows()[0] == pairs.pairs[0]._asdict()
    assert str(pairs) == pairs.table()
    assert len(pairs.table(3).splitlines()) == 4
    drawn = pairs.figure(3)
    assert list(drawn.data[0].x) == pytest.approx([pair.score for pair in pairs.top(3)])
    merged = merge_heads(model, 0, [[1, 3], [0, 2]], TOKENS, verbose=False)
    assert [row["heads"] for row in merged.rows()] == ["1, 3", "0, 2", "all"]
    assert merged.rows()[2]["kl"] == merged.cost.kl
    assert merged.rows()[1]["ablated_loss"] == merged.groups[1].ablated.loss
    lines = str(merged).splitlines()
    assert lines[0].startswith(f"layer 0, 18 tokens; loss before {merged.loss:.4f}")
    assert f"{merged.groups[1].cost.kl:.2g}" in lines[3]
    heights = [merged.groups[0].cost.kl, merged.groups[0].ablated.kl, merged.groups[1].cost.kl]
    assert list(merged.figure().data[0].x)[:3] == pytest.approx(heights)
    one = merge_heads(model, 0, [[1, 3]], TOKENS, verbose=False)
    assert [row["heads"] for row in one.rows()] == ["1, 3"]
    assert len(one.figure().data[0].x) == 2
    for result in (pairs, merged):
        with pytest.raises(ValueError, match="k is at least 1"):
            result.top(0)


def test_a_model_that_predicts_no_next_token_has_divergences_and_no_loss() -> None:
    for changes in ({"attention_dir": "bidirectional"}, {"d_vocab_out": 7}):
        found = merge_heads(heads_model(**changes), 0, [[0, 1]], TOKENS, verbose=False)
        assert (found.loss, found.cost.loss, found.ablated.loss) == (None, None, None)
        assert found.cost.kl > 0
        assert "loss before" not in found.table()


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": [[0, 4]]}, "there is no head 4"),
        ({"groups": [[0, -1]]}, "there is no head -1"),
        ({"groups": [[0]]}, "two heads or more"),
        ({"groups": [0, 1]}, "two heads or more"),
        ({"groups": []}, "one group or more"),
        ({"groups": [[0, 1], [1, 2]]}, "no head twice"),
        ({"groups": [[0, 0]]}, "no head twice"),
        ({"layer": 2}, "2"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_heads(heads_model(), **{"layer": 0, "groups": [[0, 1]], "prompts": TOKENS, "verbose": False, **arguments})


LATENT: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 2, "d_latent_kv": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LATENT, "latents"),
        ({"attention_gate": True}, "gate"),
        ({"clip_qkv": 1.0}, "clip_qkv"),
        ({"attention_sinks": True}, "sinks"),
    ],
    ids=["latents", "gate", "clip", "sinks"],
)
def test_heads_whose_output_is_no_sum_of_products_raise(changes: dict[str, Any], message: str) -> None:
    model = heads_model(**changes)
    with pytest.raises(ValueError, match=message):
        merge_heads(model, 0, [[0, 1]], TOKENS, verbose=False)
    with pytest.raises(ValueError, match=message):
        suggest_merges(model, TOKENS, verbose=False)


def test_hooks_and_too_short_prompts_raise() -> None:
    model = heads_model()
    with pytest.raises(ValueError, match="no query counts"):
        suggest_merges(model, TOKENS[:, :1], verbose=False)
    model.add_perma_hook("blocks.0.hook_resid_pre", lambda x, hook: x)
    with pytest.raises(ValueError, match="hooks are attached"):
        merge_heads(model, 0, [[0, 1]], TOKENS, verbose=False)
