"""Path patching is what two hooked runs give, what the equations say, and what the induction circuit is known to do."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, UnknownHookError, metrics
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.names import get_act_name
from hooked_lm.patching.path import (
    Node,
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
    path_patch,
    path_patch_heads,
    path_patch_mlps,
)
from tests.architectures_helpers import LATENT
from tests.helpers import tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(seed=1), tiny_tokens(seed=2)
METRIC = metrics.logit_diff(3, 4)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "attention only": {"attn_only": True},
    "parallel": {"parallel_attn_mlp": True},
    "grouped rotary gated": {
        "n_key_value_heads": 1,
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "use_qk_norm": True,
    },
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "norms on the stream": {"norm_placement": "residual"},
    "norms after": {"norm_placement": "after"},
    "norms before and after": {"norm_placement": "before_and_after", "attn_scores_soft_cap": 2.0},
    "experts from block to block": {
        "n_layers": 4,
        "shortcut_experts": True,
        "num_experts": 3,
        "identity_experts": 1,
        "experts_per_token": 2,
    },
    "latent attention": LATENT,
    "a layer before the unembedding, no first norm": {"unembed_act_fn": "silu", "first_norm": False},
    "gated attention": {"attention_gate": True, "n_key_value_heads": 1},
    "experts": {
        "num_experts": 3,
        "experts_per_token": 2,
        "norm_topk_prob": True,
        "act_fn": "silu",
        "gated_mlp": True,
    },
    "sinks, windows": {"attention_sinks": True, "window_size": 3, "attn_types": ["local", "global", "local"]},
}


def deep_model(**changes: Any) -> HookedTransformer:
    return tiny_model(**{"n_layers": 3, **changes})


def cached(model: HookedTransformer, tokens: Tensor, **how: Any) -> Any:
    """Everything that a test here sends, freezes or writes out."""
    sites = ("*.hook_z", "*_out", "*.hook_resid_*", "*.attn.hook_?", "hook_*embed")
    names = [name for site in sites for name in model.hook_dict if fnmatchcase(name, site)]
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name for name in names if "unembed" not in name], **how)[1]


def putting(value: Tensor, pick: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Tensor]:
    """A hook that writes the picked part of `value` over that of the activation."""

    def write(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        pick(x).copy_(pick(value))
        return x

    return write


def part_of(node: Node) -> Callable[[Tensor], Tensor]:
    """A view of what a node is, of an activation [batch pos (head) ...]."""

    def pick(x: Tensor) -> Tensor:
        x = x if node.pos is None else x[:, node.pos : node.pos + 1]  # type: ignore[operator, misc]
        return x if node.head is None else x[:, :, node.head]

    return pick


def two_runs(
    model: HookedTransformer,
    senders: list[Node],
    receivers: list[Node],
    routes: str = "direct",
    metric: Any = METRIC,
    caches: tuple[Any, Any] | None = None,
    **how: Any,
) -> float:
    """Path patching as the paper describes it: two runs of the whole model, with hooks on everything that is frozen."""
    clean, corrupted = caches or (cached(model, CLEAN, **how), cached(model, CORRUPTED, **how))
    frozen = []
    for layer in range(model.cfg.n_layers):
        if routes != "all":
            frozen.append((get_act_name("z", layer), putting(corrupted["z", layer])))
        if routes == "direct" and not model.cfg.attn_only:
            frozen.append((get_act_name("mlp_out", layer), putting(corrupted["mlp_out", layer])))
    last = model.cfg.n_layers
    sent = [(node.site(last), putting(clean[node.site(last)], part_of(node))) for node in senders]
    with torch.no_grad(), model.hooks(fwd_hooks=[*frozen, *sent]):
        sites = [node.site(last) for node in receivers]
        heard = model.run_with_cache(CORRUPTED, names_filter=sites, **how)[1]
    received = [(node.site(last), putting(heard[node.site(last)], part_of(node))) for node in receivers]
    with torch.no_grad():
        return float(metric(model.run_with_hooks(CORRUPTED, fwd_hooks=received, **how)))


def patched(model: HookedTransformer, senders: list[Any], receivers: Any, **how: Any) -> Tensor:
    how = {"metric": METRIC, "verbose": False, **how}
    return path_patch(model, CORRUPTED, CLEAN, senders=senders, receivers=receivers, **how)


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64), rtol=0, atol=1e-10
    )


# Against two whole runs


@pytest.mark.parametrize("routes", ["direct", "mlps", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_path_patching_is_what_two_hooked_runs_of_the_whole_model_give(name: str, routes: str) -> None:
    model = deep_model(**ARCHITECTURES[name])
    caches = cached(model, CLEAN), cached(model, CORRUPTED)
    mlp = [] if model.cfg.attn_only else [Node("mlp_in", 2)]
    receivers = [
        [Node("q", 2, 0), *mlp],
        [Node("v", 1, 0, pos=6), Node("k", 2, 0)],
        [Node("resid_pre", 2, pos=6)],
        [Node("logits")],
    ]
    receivers += [[Node("gate", 2, 1)], [Node("gate", 1, pos=6), Node("q", 2)]] if model.cfg.attention_gate else []
    senders = [
        [Node("z", 0, 1)],
        [Node("embed"), Node("z", 1, 0)],
        [Node("z", 0, 2, pos=6), Node("attn_out", 1, pos=6)],
    ]
    senders += [] if model.cfg.attn_only else [[Node("mlp_out", 0), Node("z", 1, 0)]]
    for receiver in receivers:
        expected = [two_runs(model, sender, receiver, routes, caches=caches) for sender in senders]
        assert_same(patched(model, senders, receiver, routes=routes), expected)


@pytest.mark.parametrize("routes", ["direct", "mlps", "all"])
def test_streams_and_positions_send_and_receive(routes: str) -> None:
    model = deep_model()
    caches = cached(model, CLEAN), cached(model, CORRUPTED)
    for sender in ("resid_pre", "resid_mid", "resid_post", "mlp_out"):
        for receiver in ([Node("resid_mid", 1)], [Node("resid_post", 1), Node("mlp_in", 1)], [Node("q", 1)]):
            node = Node(sender, 0, pos=3)
            expected = two_runs(model, [node], receiver, routes, caches=caches)
            assert_same(patched(model, [node], receiver, routes=routes), [expected])
    assert_same(patched(model, ["pos_embed"], "logits", routes=routes), METRIC(model(CORRUPTED)).detach()[None])


def test_sent_and_frozen_values_differ_so_that_the_comparison_bites() -> None:
    model, receiver = deep_model(), [Node("k", 2)]
    results = [float(patched(model, [("z", 0, 1)], receiver, routes=routes)) for routes in ("direct", "mlps", "all")]
    baseline = float(METRIC(model(CORRUPTED)).detach())
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert abs(results[one] - results[other]) > 1e-4
    assert min(abs(result - baseline) for result in results) > 1e-4


def test_padded_prompts_are_patched_as_they_are_run() -> None:
    model = deep_model(positional_embedding_type="rotary")
    mask = torch.ones_like(CORRUPTED)
    mask[0, :2] = 0
    for routes in ("direct", "mlps", "all"):
        result = patched(model, [("z", 0, 1)], ("k", 2, 0), routes=routes, attention_mask=mask)
        assert_same(result, [two_runs(model, [Node("z", 0, 1)], [Node("k", 2, 0)], routes, attention_mask=mask)])
    assert abs(float(result) - float(patched(model, [("z", 0, 1)], ("k", 2, 0), routes="all"))) > 1e-6  # unpadded


# Against the equations


def linear_model(n_layers: int = 2) -> HookedTransformer:
    # Without a norm scores are small and patterns hardly move: a larger scale makes them.
    return tiny_model(n_layers=n_layers, attn_only=True, normalization_type=None, attn_scale=0.1)


def logits_of(model: HookedTransformer, stream: Tensor) -> Tensor:
    return stream @ model.W_U + model.b_U


def test_without_norms_the_direct_path_to_the_logits_is_the_heads_own_change_through_OV_and_unembedding() -> None:
    model = linear_model()
    clean, corrupted = cached(model, CLEAN), cached(model, CORRUPTED)
    direction = model.W_U[:, 3] - model.W_U[:, 4]
    expected = torch.zeros(2, 3)
    for layer in range(2):
        change = clean["z", layer][:, -1] - corrupted["z", layer][:, -1]  # [batch head d_head]
        expected = expected.double()
        for head in range(3):
            expected[layer, head] = (change[:, head] @ model.blocks[layer].attn.W_O[head] @ direction).mean()
    baseline = METRIC(model(CORRUPTED)).detach()
    result = path_patch_heads(model, CORRUPTED, CLEAN, METRIC, "logits", verbose=False)
    assert_same(result - baseline, expected.detach())


def test_with_a_norm_the_direct_path_to_the_logits_is_the_changed_stream_normalised_and_unembedded() -> None:
    model = tiny_model()
    clean, corrupted = cached(model, CLEAN), cached(model, CORRUPTED)
    change = (clean["z", 0] - corrupted["z", 0])[:, :, 1] @ model.blocks[0].attn.W_O[1]
    stream = corrupted["resid_post", 1] + change
    centred = stream - stream.mean(-1, keepdim=True)
    normalized = centred / (centred.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    logits = logits_of(model, normalized * model.ln_final.w + model.ln_final.b)
    assert_same(patched(model, [("z", 0, 1)], "logits"), METRIC(logits).detach()[None])


def test_the_path_into_keys_is_the_pattern_that_the_changed_keys_make() -> None:
    model = linear_model()
    clean, corrupted = cached(model, CLEAN), cached(model, CORRUPTED)
    first, second = model.blocks[0].attn, model.blocks[1].attn
    change = (clean["z", 0] - corrupted["z", 0])[:, :, 1] @ first.W_O[1]
    keys = corrupted["k", 1][:, :, 2] + change @ second.W_K[2]
    scores = corrupted["q", 1][:, :, 2] @ keys.mT / model.cfg.attn_scale
    future = torch.ones(7, 7).triu(1).bool()
    pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
    moved = (pattern @ corrupted["v", 1][:, :, 2] - corrupted["z", 1][:, :, 2]) @ second.W_O[2]
    expected = METRIC(logits_of(model, corrupted["resid_post", 1] + moved))
    assert_same(patched(model, [("z", 0, 1)], ("k", 1, 2)), expected.detach()[None])
    assert abs(float((expected - METRIC(model(CORRUPTED))).detach())) > 1e-4


# All routes together


@pytest.mark.parametrize("sender", [Node("z", 0, 2), Node("z", 1, 0, pos=5), Node("mlp_out", 1), Node("embed")])
def test_by_all_routes_to_the_logits_it_is_full_activation_patching(sender: Node) -> None:
    model = deep_model()
    site = sender.site(3)
    hook = (site, putting(cached(model, CLEAN)[site], part_of(sender)))
    full = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[hook])).detach()
    assert_same(patched(model, [sender], "logits", routes="all"), full[None])


def test_without_norms_the_direct_route_and_those_through_the_next_layer_add_up_to_the_full_effect() -> None:
    model = linear_model()
    baseline = METRIC(model(CORRUPTED)).detach()
    readers = [Node("q", 1), Node("k", 1), Node("v", 1)]
    for head in range(3):
        sender = [("z", 0, head)]
        routes = [float(patched(model, sender, way) - baseline) for way in ("logits", readers)]
        full = float(patched(model, sender, "logits", routes="all") - baseline)
        assert_same(sum(routes), full)
        assert min(map(abs, routes)) > 1e-4


def test_of_the_last_heads_only_the_mlp_route_is_left_besides_the_direct_one() -> None:
    model = tiny_model(n_layers=1)
    hook = ("blocks.0.attn.hook_z", putting(cached(model, CLEAN)["z", 0], part_of(Node("z", 0, 1))))
    full = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[hook])).detach()
    assert_same(patched(model, [("z", 0, 1)], "logits", routes="mlps"), full[None])
    assert abs(float(patched(model, [("z", 0, 1)], "logits")) - float(full)) > 1e-4


def test_senders_that_are_patched_together_are_one_cell() -> None:
    model = linear_model()
    baseline = METRIC(model(CORRUPTED)).detach()
    alone = patched(model, [("z", 0, 0), ("z", 1, 2)], "logits") - baseline
    together = patched(model, [[("z", 0, 0), ("z", 1, 2)]], "logits") - baseline
    assert together.shape == (1,)
    assert_same(together[0], alone.sum())
    several = patched(model, [("z", 0, (0, 2))], "logits")
    assert_same(several, patched(model, [[("z", 0, 0), ("z", 0, 2)]], "logits"))


# The induction circuit


def test_induction_runs_from_L0H0_to_the_keys_of_L1H1_and_not_to_its_queries_or_values() -> None:
    """The answer follows the second `a`; what came before it the first time says so only through the keys."""
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    clean = repeated_random_tokens(8, 12, model.cfg.d_vocab, torch.Generator().manual_seed(0))
    answer = clean[:, 6]
    corrupted = clean.clone()
    corrupted[:, 5] = clean[:, 9]
    clean, corrupted = clean[:, :18], corrupted[:, :18]
    metric = metrics.log_prob(answer)
    baseline, full = (float(metric(model(tokens)).detach()) for tokens in (corrupted, clean))
    assert full > -0.1
    assert baseline < -5
    by_head = {
        way: (path_patch_heads(model, corrupted, clean, metric, (way, 1, 1), verbose=False) - baseline)
        / (full - baseline)
        for way in "qkv"
    }
    assert by_head["k"][0, 0] > 0.99
    by_head["k"][0, 0] = 0
    assert max(float(share.abs().max()) for share in by_head.values()) < 0.01


# Batches, grids and the classic functions


def test_prompts_can_be_kept_apart() -> None:
    model = tiny_model()
    result = patched(model, [("z", 0, 1), ("mlp_out", 0)], ("v", 1), per_prompt=True)
    assert result.shape == (2, 2)
    assert_same(result.mean(1), patched(model, [("z", 0, 1), ("mlp_out", 0)], ("v", 1)))
    for prompt in range(2):
        alone = path_patch(
            model,
            CORRUPTED[prompt : prompt + 1],
            CLEAN[prompt : prompt + 1],
            METRIC,
            [("z", 0, 1), ("mlp_out", 0)],
            ("v", 1),
            verbose=False,
        )
        assert_same(alone, result[:, prompt])


def test_a_small_memory_budget_changes_nothing() -> None:
    model = deep_model()
    how: dict[str, Any] = {"routes": "mlps", "verbose": False}
    whole = path_patch_heads(model, CORRUPTED, CLEAN, METRIC, [("q", 2), ("mlp_in", 1)], **how)
    parts = path_patch_heads(model, CORRUPTED, CLEAN, METRIC, [("q", 2), ("mlp_in", 1)], memory_budget=1, **how)
    assert_same(whole, parts)


def test_grids_hold_each_head_and_each_mlp_and_the_baseline_where_there_is_no_path() -> None:
    model = deep_model()
    baseline = METRIC(model(CORRUPTED)).detach()
    heads = path_patch_heads(model, CORRUPTED, CLEAN, METRIC, ("k", 1, 2), verbose=False)
    mlps = path_patch_mlps(model, CORRUPTED, CLEAN, METRIC, ("k", 1, 2), verbose=False)
    assert heads.shape == (3, 3)
    assert mlps.shape == (3,)
    assert_same(heads[0], patched(model, [("z", 0, head) for head in range(3)], ("k", 1, 2)))
    assert_same(mlps[:1], patched(model, [("mlp_out", 0)], ("k", 1, 2)))
    assert_same(heads[1:], baseline.expand(2, 3))
    assert_same(mlps[1:], baseline.expand(2))
    last = path_patch_heads(model, CORRUPTED, CLEAN, METRIC, "logits", pos=-1, verbose=False)
    assert_same(last, path_patch_heads(model, CORRUPTED, CLEAN, METRIC, "logits", verbose=False))


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_the_classic_functions_are_direct_paths_to_every_head(component: str) -> None:
    model = deep_model(n_key_value_heads=1)
    clean, corrupted = cached(model, CLEAN), cached(model, CORRUPTED)
    baseline = METRIC(model(CORRUPTED)).detach()
    kv_heads = 3 if component == "q" else 1
    every = get_act_patch_direct_path_all_sources(
        model, CORRUPTED, clean, corrupted, METRIC, component=component, verbose=False
    )
    assert every.shape == (3, 3, 3, kv_heads)
    for layer, head in [(0, 1), (1, 2)]:
        one = get_act_patch_direct_path(
            model, CORRUPTED, clean, None, METRIC, layer, head, component=component, verbose=False
        )
        assert_same(one, every[layer, head])
        assert_same(one[: layer + 1], baseline.expand(layer + 1, kv_heads))
        for to_layer in range(layer + 1, 3):
            for to_head in range(kv_heads):
                expected = patched(model, [("z", layer, head)], (component, to_layer, to_head))
                assert_same(one[to_layer, to_head], expected[0])
    assert (every[0] - baseline).abs().min(0).values[1:].min() > 1e-6


def test_a_cache_and_the_prompts_it_came_from_give_the_same() -> None:
    model = tiny_model()
    from_cache = path_patch(model, CORRUPTED, cached(model, CLEAN), METRIC, [("z", 0, 1)], ("v", 1), verbose=False)
    assert_same(from_cache, patched(model, [("z", 0, 1)], ("v", 1)))


def test_classic_names_and_any_function_on_logits_do() -> None:
    model = tiny_model()

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, 2:, 3] - logits[:, 2:, 4]).mean()

    result = patched(model, [("result", 0, 1)], ("k_input", 1, 0), metric=metric)
    assert_same(result, [two_runs(model, [Node("z", 0, 1)], [Node("k", 1, 0)], metric=metric)])


# Errors


@pytest.mark.parametrize(
    ("senders", "receivers", "message"),
    [
        ([("k", 0, 1)], "logits", "'k' is no sender: senders are 'embed'"),
        ([("z", 0, 1)], ("z", 1, 0), "'z' is no receiver: receivers are 'resid_pre'"),
        ([("z", 2, 1)], "logits", "layers run 0-1"),
        ([("z", 0, 3)], "logits", "heads 0-2"),
        ([("z", 0, 1, 7)], "logits", "pos 7: the prompts have 7 positions"),
        ([("embed", 0)], "logits", "belongs to no layer"),
        ([("mlp_out",)], "logits", "is in a layer: give it"),
        ([("mlp_out", 0, 1)], "logits", "there is no head to select"),
        ([("z", 1, 0)], ("k", 1, 1), "there is no path from Node"),
        ([("z", 0, 0, 3)], ("k", 1, 1, 4), "there is no path from Node"),
        ([("z", 0, 0), ("mlp_out", 1)], ("mlp_in", 1), "there is no path from Node"),
        ([], "logits", "path_patch has no senders"),
        ([[]], "logits", "a set of senders is empty"),
        ([("z", 0, 0)], [], "a set of receivers is empty"),
    ],
)
def test_paths_that_do_not_exist_are_named_before_anything_runs(senders: Any, receivers: Any, message: str) -> None:
    model = tiny_model()
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match=message):
        patched(model, senders, receivers)
    assert not runs


def test_other_arguments_that_cannot_be_are_named_before_anything_runs() -> None:
    model, sender = tiny_model(), [("z", 0, 1)]
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError, match="routes are one of"):
        patched(model, sender, "logits", routes="heads")
    with pytest.raises(ValueError, match="clean prompts have 6 positions and corrupted ones 7"):
        path_patch(model, CORRUPTED, CLEAN[:, :6], METRIC, sender, "logits", verbose=False)
    with pytest.raises(ValueError, match="has answers for 3 prompts; there are 2"):
        patched(model, sender, "logits", metric=metrics.logit([1, 2, 3]))
    with pytest.raises(ValueError, match=r"per_prompt needs a metric of hooked_lm\.metrics"):
        patched(model, sender, "logits", metric=lambda logits: logits.sum(), per_prompt=True)
    with pytest.raises(ValueError, match="component is 'q', 'k' or 'v', got 'z'"):
        get_act_patch_direct_path(model, CORRUPTED, CLEAN, None, METRIC, 0, 0, component="z", verbose=False)
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: x)]),
        pytest.raises(ValueError, match=r"remove the hook at 'blocks\.1\.attn\.hook_z' first"),
    ):
        patched(model, sender, "logits")
    assert not runs


def test_caches_that_do_not_fit_are_named() -> None:
    model, sender = tiny_model(), [("z", 0, 1)]
    short = cached(model, CLEAN[:, :6])
    with pytest.raises(
        ValueError,
        match=r"clean prompts have 6 positions and corrupted ones 7 \('blocks\.0\.attn\.hook_z' in the clean cache",
    ):
        path_patch(model, CORRUPTED, short, METRIC, sender, "logits", verbose=False)
    few = model.run_with_cache(CLEAN, names_filter="blocks.1.*")[1]
    with pytest.raises(UnknownHookError, match=r"the clean cache has no 'blocks\.0\.attn\.hook_z'"):
        path_patch(model, CORRUPTED, few, METRIC, sender, "logits", verbose=False)
    with pytest.raises(UnknownHookError, match=r"the corrupted cache has no 'blocks\.0\.attn\.hook_z'"):
        get_act_patch_direct_path(model, CORRUPTED, CLEAN, few, METRIC, 0, 0, verbose=False)
    other = cached(model, CORRUPTED[:1])
    with pytest.raises(ValueError, match="there are 1 corrupted prompts and 2 that are patched"):
        get_act_patch_direct_path(model, CORRUPTED, CLEAN, other, METRIC, 0, 0, verbose=False)


def test_sites_that_an_architecture_lacks_are_named() -> None:
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks\.0\.hook_mlp_out'"):
        patched(tiny_model(attn_only=True), [("mlp_out", 0)], "logits")
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        patched(tiny_model(parallel_attn_mlp=True), [("resid_mid", 0)], "logits")
    with pytest.raises(ValueError, match="there is no path from Node"):  # both read the stream that enters
        patched(tiny_model(parallel_attn_mlp=True), [("attn_out", 1)], ("mlp_in", 1))
    with pytest.raises(ValueError, match="they cannot be senders"):
        patched(tiny_model(positional_embedding_type="shortformer"), ["pos_embed"], "logits")


@pytest.mark.parametrize("value", [lambda logits: logits[:, -1, 0], lambda logits: logits.sum() * float("nan")])
def test_metrics_that_are_no_numbers_raise(value: Any) -> None:
    with pytest.raises(ValueError, match=r"returned shape \(2,\)|not a number"):
        patched(tiny_model(), [("z", 0, 1)], "logits", metric=value)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = patched(model, [("z", 0, 1)], ("k", 1, 0), routes="mlps")
    assert not result.requires_grad
    assert not any(point.live for point in model.hook_points())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
