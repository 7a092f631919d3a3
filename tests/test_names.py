"""Hook names: short forms, what a filter picks, and what is said of a name nobody knows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint, UnknownHookError, utils
from hooked_lm.names import AXES, GRID_AXES, get_act_name, layer_of, select_names, selected_axis
from tests.helpers import tiny_model

BLOCK_SITES = [
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "q_input",
    "k_input",
    "v_input",
    "mlp_in",
    "attn_out",
    "mlp_out",
]
ATTN_SITES = ["q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern", "result"]
MLP_SITES = ["pre", "mid", "post", "pre_linear", "expert_weights", "expert_indices"]
HOMES = {
    **dict.fromkeys(BLOCK_SITES, ""),
    **dict.fromkeys(ATTN_SITES, "attn."),
    **dict.fromkeys(MLP_SITES, "mlp."),
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model()


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def n_handles(model: HookedTransformer) -> int:
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_points())


# Short names


@pytest.mark.parametrize("site", sorted(HOMES))
def test_a_site_of_a_block_gets_its_module_and_layer(site: str) -> None:
    assert get_act_name(site, 3) == f"blocks.3.{HOMES[site]}hook_{site}"


@pytest.mark.parametrize(
    ("arguments", "full"),
    [
        (("embed",), "hook_embed"),
        (("pos_embed",), "hook_pos_embed"),
        (("tokens",), "hook_tokens"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("in", None, "unembed"), "unembed.hook_in"),
        (("out", None, "unembed"), "unembed.hook_out"),
        (("scale", 4, "ln1"), "blocks.4.ln1.hook_scale"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("scale", 1, "ln1_post"), "blocks.1.ln1_post.hook_scale"),
        (("normalized", 1, "ln2_post"), "blocks.1.ln2_post.hook_normalized"),
        (("attn", 5), "blocks.5.attn.hook_pattern"),
        (("attn_logits", 5), "blocks.5.attn.hook_attn_scores"),
        (("query", 5), "blocks.5.attn.hook_q"),
        (("key", 5), "blocks.5.attn.hook_k"),
        (("value", 5), "blocks.5.attn.hook_v"),
        (("mlp_pre", 5), "blocks.5.mlp.hook_pre"),
        (("mlp_mid", 5), "blocks.5.mlp.hook_mid"),
        (("mlp_post", 5), "blocks.5.mlp.hook_post"),
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("k", 6, "attn"), "blocks.6.attn.hook_k"),
        (("k", 6, "attention"), "blocks.6.attn.hook_k"),
        (("pre", 2, "m"), "blocks.2.mlp.hook_pre"),
        (("pre", 2, "mlp"), "blocks.2.mlp.hook_pre"),
        (("resid_pre", 2, "b"), "blocks.2.hook_resid_pre"),
        (("resid_pre", 2, "block"), "blocks.2.hook_resid_pre"),
        (("resid_pre", 2, "blocks"), "blocks.2.hook_resid_pre"),
        (("q", "7"), "blocks.7.attn.hook_q"),
        (("q", "*"), "blocks.*.attn.hook_q"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("k2a",), "blocks.2.attn.hook_k"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("pre5m",), "blocks.5.mlp.hook_pre"),
        (("pattern12",), "blocks.12.attn.hook_pattern"),
        (("attn12",), "blocks.12.attn.hook_pattern"),
        (("resid_post0",), "blocks.0.hook_resid_post"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("normalized10ln2",), "blocks.10.ln2.hook_normalized"),
        (("blocks.3.attn.hook_q",), "blocks.3.attn.hook_q"),
        (("hook_embed",), "hook_embed"),
        (("unembed.hook_in",), "unembed.hook_in"),
        (("ln_final.hook_scale",), "ln_final.hook_scale"),
    ],
)
def test_a_short_name_becomes_the_full_one(arguments: tuple[str | int | None, ...], full: str) -> None:
    assert get_act_name(*arguments) == full  # type: ignore[arg-type]
    assert utils.get_act_name(*arguments) == full  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qq", 1), r"unknown activation 'qq'"),
        (("patern", 1), r"unknown activation 'patern'; did you mean 'pattern'"),
        (("q",), r"'q' lives in a block: give its layer"),
        (("resid_pre",), r"'resid_pre' lives in a block"),
        (("embed", 2), r"'embed' belongs to the whole model: give no layer \(got 2\)"),
        (("q", 1, "mlp"), r"'q' lives in 'attn', not in 'mlp'"),
        (("pre", 1, "attn"), r"'pre' lives in 'mlp', not in 'attn'"),
        (("resid_pre", 1, "attn"), r"'resid_pre' lives in 'the block', not in 'attn'"),
        (("scale", 1), r"'scale' with layer 1 and module None: give a layer and one of"),
        (("normalized", 1, "ln3"), r"module 'ln3'"),
        (("scale", None, "ln1"), r"'scale' with layer None and module 'ln1'"),
    ],
)
def test_a_short_name_that_makes_no_sense_says_why(arguments: tuple[str | int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_act_name(*arguments)  # type: ignore[arg-type]


@given(st.sampled_from(sorted(HOMES)), st.integers(0, 10_000))
def test_the_layer_of_a_full_name_is_the_one_it_was_made_from(site: str, layer: int) -> None:
    full = get_act_name(site, layer)
    assert layer_of(full) == layer
    assert full.endswith(f"hook_{site}")
    assert get_act_name(full) == full
    assert get_act_name(f"{site}{layer}") == full


@given(st.sampled_from(["scale", "normalized"]), st.integers(0, 10_000), st.sampled_from(["ln1", "ln2", "ln1_post"]))
def test_the_layer_of_a_norm_site_is_the_one_it_was_made_from(site: str, layer: int, norm: str) -> None:
    full = get_act_name(site, layer, norm)
    assert full == f"blocks.{layer}.{norm}.hook_{site}"
    assert layer_of(full) == layer
    assert get_act_name(f"{site}{layer}{norm}") == full


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_scale", "unembed.hook_out", "hook_tokens"])
def test_a_site_of_the_whole_model_has_no_layer(name: str) -> None:
    assert layer_of(name) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positional_embedding_type": "rotary", "gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS"},
        {"act_fn": "solu_ln"},
        {"num_experts": 3, "experts_per_token": 2},
        {"use_normalization_before_and_after": True},
    ],
)
def test_every_hook_point_of_a_block_has_a_short_name(changes: dict[str, object]) -> None:
    for name in tiny_model(**changes).hook_dict:
        parts = name.split(".")
        if parts[0] != "blocks" or parts[2:4] == ["mlp", "ln"]:
            continue
        module = parts[2] if len(parts) == 4 else "block"
        assert get_act_name(parts[-1].removeprefix("hook_"), int(parts[1]), module) == name


# What a filter picks


def test_a_glob_picks_every_name_it_matches(model: HookedTransformer) -> None:
    assert model.hook_names("blocks.*.attn.hook_pattern") == [
        "blocks.0.attn.hook_pattern",
        "blocks.1.attn.hook_pattern",
    ]
    assert model.hook_names("blocks.1.attn.hook_[qkv]") == [f"blocks.1.attn.hook_{x}" for x in "qkv"]
    assert model.hook_names("blocks.?.hook_resid_pre") == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    assert set(model.hook_names("*")) == set(model.hook_dict)


def test_a_predicate_picks_what_it_is_true_of(model: HookedTransformer) -> None:
    picked = model.hook_names(lambda name: name.endswith("resid_post"))
    assert picked == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.mark.parametrize("container", [list, tuple, set, frozenset, iter])
def test_an_iterable_of_names_and_globs_picks_each_once_in_the_models_order(
    model: HookedTransformer, container: type
) -> None:
    wanted = container(["blocks.1.attn.hook_q", "hook_embed", "blocks.*.attn.hook_q"])
    assert model.hook_names(wanted) == ["hook_embed", "blocks.0.attn.hook_q", "blocks.1.attn.hook_q"]


def test_no_filter_picks_everything(model: HookedTransformer) -> None:
    assert model.hook_names() == list(model.hook_dict)


def test_a_glob_is_case_sensitive(model: HookedTransformer) -> None:
    with pytest.raises(UnknownHookError, match="HOOK_PATTERN"):
        model.hook_names("blocks.*.attn.HOOK_PATTERN")


def test_a_plain_name_is_not_a_prefix() -> None:
    with pytest.raises(UnknownHookError, match=r"no hook 'blocks.1'"):
        select_names("blocks.1", ["blocks.1.hook_a", "blocks.10.hook_a"])
    assert select_names("blocks.1.hook_a", ["blocks.1.hook_a", "blocks.10.hook_a"]) == ["blocks.1.hook_a"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            "blocks.0.attn.hook_patern",
            r"no hook 'blocks.0.attn.hook_patern'; did you mean 'blocks.0.attn.hook_pattern'",
        ),
        ("blocks.12.attn.hook_q", r"no hook 'blocks.12.attn.hook_q': layers run 0-1$"),
        ("blocks.2.hook_resid_pre", r"no hook 'blocks.2.hook_resid_pre': layers run 0-1$"),
        ("pattern", r"no hook 'pattern'; did you mean 'blocks.0.attn.hook_pattern'"),
        ("blocks.*.attn.hook_patern", r"the pattern 'blocks.\*.attn.hook_patern' matches no hook; did you mean"),
        ("zzzzzz", r"no hook 'zzzzzz'; hook_names\(\)"),
        ([], "the names filter is empty"),
        (lambda name: False, "matches none of the"),
        (
            ["hook_embed", "blocks.0.hook_resid_per"],
            "no hook 'blocks.0.hook_resid_per'; did you mean 'blocks.0.hook_re",
        ),
        (["hook_embed", "blocks.*.nothing"], r"the pattern 'blocks.\*.nothing' matches no hook"),
    ],
)
def test_a_filter_that_matches_nothing_says_so_wherever_it_is_given(
    model: HookedTransformer, bad: object, message: str
) -> None:
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(UnknownHookError, match=message):
        model.hook_names(bad)
    with pytest.raises(UnknownHookError, match=message):
        model.add_hook(bad, double)
    with pytest.raises(UnknownHookError, match=message):
        model.add_perma_hook(bad, double)
    with (
        pytest.raises(UnknownHookError, match=message),
        model.hooks(fwd_hooks=[("hook_embed", double), (bad, double)]),
    ):
        pass
    with pytest.raises(UnknownHookError, match=message):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double), (bad, double)])
    with pytest.raises(UnknownHookError, match=message):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", double)], bwd_hooks=[(bad, double)])
    with pytest.raises(UnknownHookError, match=message):
        model.run_with_cache(tokens, names_filter=bad)
    assert n_handles(model) == 0


@pytest.mark.parametrize("bad", [3, 2.5, ["hook_embed", 3]])
def test_a_filter_of_the_wrong_type_raises(model: HookedTransformer, bad: object) -> None:
    with pytest.raises(TypeError, match=r"names filter is None|a list of names holds strings"):
        model.hook_names(bad)  # type: ignore[arg-type]


def test_an_unknown_hook_is_a_key_error_whose_text_reads_plainly(model: HookedTransformer) -> None:
    with pytest.raises(KeyError, match=r"^no hook 'blocks.7.hook_resid_pre': layers run 0-1$"):
        model.hook_names("blocks.7.hook_resid_pre")


# Axes


@pytest.mark.parametrize("name", GRID_AXES)
def test_a_grid_goes_along_axes_that_its_field_selects(name: str) -> None:
    for axis in GRID_AXES[name].along:
        assert axis in AXES
        assert selected_axis(("batch", axis), GRID_AXES[name].field) == 1


@pytest.mark.parametrize("last", ["pos", "query", "head", "kv_head", "1", "chosen"])
def test_these_last_axes_have_no_features(last: str) -> None:
    assert selected_axis(("batch", last), "feature") is None
    assert selected_axis(("batch", last, "d_sae"), "feature") == 2
