"""Every engine takes the clean run in the same forms: prompts or a cache, one for each corrupted prompt or for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_lm import HookedTransformer, UnknownHookError, metrics, patching
from hooked_lm.patching import PATCHES
from hooked_lm.patching.patches import patch_cell
from tests.helpers import VOCAB, tiny_config, tiny_model, tiny_tokens

CLEAN, CORRUPTED = tiny_tokens(pos=5, seed=1), tiny_tokens(pos=5, seed=2)
METRIC = metrics.logit_diff([3, 4], [7, 8])
QUIET: dict[str, Any] = {"verbose": False}
SITES = ["hook_embed", "*.hook_resid_*", "*.attn.hook_?", "*.attn.hook_pattern", "*.hook_*_out"]

Engine = Callable[..., Tensor]


def by_setter(model: HookedTransformer, corrupted: Any, clean: Any, setter: Any, **how: Any) -> Tensor:
    axes = ("layer", "head") if setter is whole_activation else ("layer", "pos", "head")
    result: Tensor = patching.generic_activation_patch(
        model, corrupted, clean, METRIC, setter, "z", axes, **QUIET, **how
    )
    return result


def whole_activation(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    return clean


def estimated(model: HookedTransformer, corrupted: Any, clean: Any, **how: Any) -> Tensor:
    grids = ["resid_pre", "attn_head_q_by_pos", "attn_head_k_all_pos", "attn_head_pattern_by_pos"]
    fixed = how.pop("qk_fix", False)
    result = patching.attribution_patch(model, corrupted, clean, METRIC, grids, qk_fix=fixed, **QUIET, **how)
    return torch.cat([result[name].flatten() for name in grids])


def audited(model: HookedTransformer, corrupted: Any, clean: Any, **how: Any) -> Tensor:
    result = patching.attribution_patch(
        model, corrupted, clean, METRIC, ["attn_head_k_by_pos"], audit=3, **QUIET, **how
    )
    return torch.tensor([one.exact for one in result.audits["attn_head_k_by_pos"].cells])


def all_sources(model: HookedTransformer, corrupted: Any, clean: Any) -> Tensor:
    return patching.get_act_patch_direct_path_all_sources(model, corrupted, clean, None, METRIC, "k", verbose=False)


ENGINES: dict[str, Engine] = {
    **{
        name: lambda *runs, name=name, **how: getattr(patching, f"get_act_patch_{name}")(*runs, METRIC, **QUIET, **how)
        for name in ("resid_pre", "attn_head_v_by_pos", "attn_head_pattern_dest_src_pos", "block_every")
    },
    "get_act_patch": lambda *runs, **how: patching.get_act_patch("mlp_out", *runs, METRIC, **QUIET, **how),
    "setter": lambda *runs, **how: by_setter(*runs, patching.layer_pos_head_vector_patch_setter, **how),
    "function": lambda *runs, **how: by_setter(*runs, whole_activation, **how),
    "attribution": estimated,
    "attribution with qk_fix": lambda *runs, **how: estimated(*runs, qk_fix=True, **how),
    "audit": audited,
    "path": lambda *runs, **how: patching.path_patch(
        *runs, METRIC, [("z", 0, 1), [("embed",), ("z", 1, 0, 4)]], ["logits", ("k", 1)], **QUIET, **how
    ),
    "path by mlps": lambda *runs, **how: patching.path_patch_mlps(
        *runs, METRIC, "logits", routes="mlps", **QUIET, **how
    ),
    "path by all": lambda *runs, **how: patching.path_patch_heads(
        *runs, METRIC, "logits", routes="all", **QUIET, **how
    ),
}
WITHOUT_MASK: dict[str, Engine] = {"direct path": all_sources}


def recorded(model: HookedTransformer, tokens: Any, **how: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=SITES, **how)[1]


FORMS: dict[str, Callable[[HookedTransformer, Tensor], Any]] = {
    "cache": recorded,
    "dictionary": lambda model, tokens: recorded(model, tokens, return_cache_object=False),
    "lazy cache": lambda model, tokens: recorded(model, tokens, lazy=True),
    "tokens": lambda model, tokens: tokens,
    "lists": lambda model, tokens: tokens.tolist(),
    "array": lambda model, tokens: tokens.numpy(),
}
FORMS_OF_ONE: dict[str, Callable[[HookedTransformer, Tensor], Any]] = {
    **FORMS,
    "cache without batch": lambda model, tokens: recorded(model, tokens, remove_batch_dim=True),
    "cache that lost its batch": lambda model, tokens: recorded(model, tokens).remove_batch_dim(),
    "dictionary without batch": lambda model, tokens: recorded(
        model, tokens, remove_batch_dim=True, return_cache_object=False
    ),
    "flat tokens": lambda model, tokens: tokens[0],
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return tiny_model()


@pytest.mark.parametrize("engine", [*ENGINES, *WITHOUT_MASK])
def test_each_form_of_the_clean_run_gives_the_same(model: HookedTransformer, engine: str) -> None:
    run = {**ENGINES, **WITHOUT_MASK}[engine]
    expected = run(model, CORRUPTED, recorded(model, CLEAN))
    for form, made in FORMS.items():
        torch.testing.assert_close(run(model, CORRUPTED, made(model, CLEAN)), expected, msg=form)
    assert expected.std() > 1e-6


@pytest.mark.parametrize("engine", [*ENGINES, *WITHOUT_MASK])
def test_one_clean_prompt_serves_all_corrupted_ones_in_each_form(model: HookedTransformer, engine: str) -> None:
    run = {**ENGINES, **WITHOUT_MASK}[engine]
    expected = run(model, CORRUPTED, recorded(model, CLEAN[:1].repeat(2, 1)))
    for form, made in FORMS_OF_ONE.items():
        torch.testing.assert_close(run(model, CORRUPTED, made(model, CLEAN[:1])), expected, msg=form)
        alone = run(model, CORRUPTED[:1].repeat(2, 1), made(model, CLEAN[:1]))  # one of each, with METRIC for two
        torch.testing.assert_close(alone, run(model, CORRUPTED[:1].repeat(2, 1), CLEAN[:1].repeat(2, 1)), msg=form)
    assert not torch.allclose(expected, run(model, CORRUPTED, CLEAN))


def test_one_clean_prompt_for_all_is_what_a_loop_of_hooked_runs_puts_in(model: HookedTransformer) -> None:
    clean = recorded(model, CLEAN[:1])
    grid = patching.get_act_patch_attn_head_out_by_pos(model, CORRUPTED, CLEAN[0], METRIC, **QUIET)
    for layer in range(2):
        for pos in range(5):
            for head in range(3):

                def patch(z: Tensor, hook: Any, layer: int = layer, pos: int = pos, head: int = head) -> Tensor:
                    z = z.clone()
                    z[:, pos, head] = clean["z", layer][0, pos, head]
                    return z

                logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)])
                torch.testing.assert_close(grid[layer, pos, head], METRIC(logits))


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_in_tokens_are_run_under_the_mask_of_the_corrupted_ones(model: HookedTransformer, engine: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    how: dict[str, Any] = {"attention_mask": mask}
    for clean in (CLEAN, CLEAN[:1].repeat(2, 1)):
        expected = ENGINES[engine](model, CORRUPTED, recorded(model, clean, attention_mask=mask), **how)
        torch.testing.assert_close(ENGINES[engine](model, CORRUPTED, clean, **how), expected)
    torch.testing.assert_close(ENGINES[engine](model, CORRUPTED, CLEAN[0], **how), expected)


# Pairs


def test_one_clean_prompt_is_paired_with_every_corrupted_one(model: HookedTransformer) -> None:
    for direction in ("denoising", "noising"):
        how: dict[str, Any] = {"patch": "attn_head_out_all_pos", "direction": direction, **QUIET}
        repeated = patching.patch_pairs(model, CLEAN[:1].repeat(2, 1), CORRUPTED, METRIC, **how)
        for clean in (CLEAN[:1], CLEAN[0], CLEAN[0].tolist()):
            pairs = patching.patch_pairs(model, clean, CORRUPTED, METRIC, **how)
            torch.testing.assert_close(pairs.per_pair, repeated.per_pair)
    raw = patching.patch_pairs(model, CLEAN[0], CORRUPTED, METRIC, normalize=None, **QUIET)
    grid = patching.get_act_patch_resid_pre(model, CORRUPTED, CLEAN[0], METRIC, per_prompt=True, **QUIET)
    torch.testing.assert_close(raw.per_pair, grid)


# Prompts kept apart


@pytest.mark.parametrize("name", ["resid_mid", "attn_head_k_by_pos", "block_every", "attn_head_by_pos_every"])
def test_grids_keep_prompts_apart_as_a_last_axis(name: str) -> None:
    model = tiny_model(n_heads=4, n_key_value_heads=2, d_head=4)
    function = getattr(patching, f"get_act_patch_{name}")
    apart = function(model, CORRUPTED, CLEAN, METRIC, per_prompt=True, **QUIET)
    together = function(model, CORRUPTED, CLEAN, METRIC, **QUIET)
    assert apart.shape == (*together.shape, 2)
    torch.testing.assert_close(apart.mean(-1), together)
    for prompt, (answer, wrong) in enumerate(((3, 7), (4, 8))):
        part = slice(prompt, prompt + 1)
        alone = function(model, CORRUPTED[part], CLEAN[part], metrics.logit_diff(answer, wrong), **QUIET)
        torch.testing.assert_close(apart[..., prompt], alone)


def test_the_generic_function_keeps_prompts_apart_too(model: HookedTransformer) -> None:
    setter = patching.layer_pos_head_vector_patch_setter
    swept = by_setter(model, CORRUPTED, CLEAN, setter, per_prompt=True)
    assert swept.shape == (2, 5, 3, 2)
    called = by_setter(model, CORRUPTED, CLEAN, lambda *one: setter(*one), per_prompt=True)
    torch.testing.assert_close(called, swept)
    torch.testing.assert_close(swept.mean(-1), by_setter(model, CORRUPTED, CLEAN, setter))
    with pytest.raises(ValueError, match=r"per_prompt needs a metric of hooked_lm\.metrics"):
        patching.generic_activation_patch(
            model, CORRUPTED, CLEAN, lambda logits: logits.mean(), lambda *one: None, "z", ("layer",), per_prompt=True
        )


# Text


@pytest.fixture
def reader(tokenizer: PreTrainedTokenizerFast) -> HookedTransformer:
    return HookedTransformer(tiny_config(d_vocab=VOCAB), tokenizer=tokenizer, default_padding_side="left")


@pytest.mark.parametrize("engine", [*ENGINES, *WITHOUT_MASK])
def test_text_is_as_good_as_its_tokens(reader: HookedTransformer, engine: str) -> None:
    run = {**ENGINES, **WITHOUT_MASK}[engine]
    corrupted, clean = ["John gave", "Mary gave"], ["Mary gave", " France"]  # seven tokens each
    tokens = [reader.to_tokens(prompts) for prompts in (corrupted, clean)]
    expected = run(reader, *tokens)
    torch.testing.assert_close(run(reader, corrupted, clean), expected)
    torch.testing.assert_close(run(reader, tokens[0], clean), expected)
    torch.testing.assert_close(run(reader, corrupted, tokens[1]), expected)
    one = run(reader, tokens[0], tokens[1][:1].repeat(2, 1))
    torch.testing.assert_close(run(reader, corrupted, clean[0]), one)
    torch.testing.assert_close(run(reader, corrupted, clean[:1]), one)


def test_text_that_starts_with_what_passes_for_padding_is_read_whole(reader: HookedTransformer) -> None:
    """The tokenizer pads with its end-of-text token, which these prompts begin with twice."""
    corrupted, clean = "<|endoftext|> John", "<|endoftext|> Mary"
    tokens = [reader.to_tokens(text) for text in (corrupted, clean)]
    whole = torch.ones_like(tokens[0])
    metric = metrics.logit_diff(3, 7)
    expected = patching.get_act_patch_resid_pre(reader, *tokens, metric, attention_mask=whole, **QUIET)
    torch.testing.assert_close(patching.get_act_patch_resid_pre(reader, corrupted, clean, metric, **QUIET), expected)


# What does not fit, in the same words everywhere


@pytest.mark.parametrize("engine", [*ENGINES, *WITHOUT_MASK])
def test_what_does_not_fit_is_refused_in_the_same_words(model: HookedTransformer, engine: str) -> None:
    run = {**ENGINES, **WITHOUT_MASK}[engine]
    three, longer = tiny_tokens(batch=3, pos=5), tiny_tokens(pos=6)
    for clean in (three, three.tolist(), recorded(model, three)):
        with pytest.raises(
            ValueError, match=r"there are 3 clean prompts and 2 corrupted ones.*: give as many, or one f"
        ):
            run(model, CORRUPTED, clean)
    for clean in (longer, longer[0], recorded(model, longer), recorded(model, longer[:1]).remove_batch_dim()):
        with pytest.raises(
            ValueError, match=r"clean prompts have 6 positions and corrupted ones 5.*: patching goes pos"
        ):
            run(model, CORRUPTED, clean)
    with pytest.raises(UnknownHookError, match=r"the clean cache has no 'blocks.0.*: record it, by name"):
        run(model, CORRUPTED, {})
    squeezed = {name: value[0, 0] for name, value in recorded(model, CLEAN).items()}
    with pytest.raises(ValueError, match=r"the clean cache's '.*' has shape .*; it should be \[batch "):
        run(model, CORRUPTED, squeezed)
    with pytest.raises(TypeError, match="give the clean prompts, or a cache of a run on them"):
        run(model, CORRUPTED, object())


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_that_are_padded_differently_are_refused(reader: HookedTransformer, engine: str) -> None:
    long, short = "When John and Mary", "John"
    with pytest.raises(ValueError, match="the clean prompt 1 is padded differently from the corrupted one"):
        ENGINES[engine](reader, [long, short], [long, long])


def test_every_patch_has_a_setter_that_means_the_same(model: HookedTransformer) -> None:
    clean = recorded(model, CLEAN)
    for patch in PATCHES.values():
        assert patch.setter is not None
        by_axis = {"layer": 1, "pos": 2, "head": 1, "dest_pos": 2, "src_pos": 0}
        one = patch.setter.intervention(
            patch.site(1), [by_axis[axis] for axis in patch.setter.index_axes], clean[patch.site(1)]
        )
        other = patch_cell(model, patch, [by_axis[axis] for axis in patch.axes], clean)
        assert one.site == other.site
        assert one.selections() == other.selections()
        torch.testing.assert_close(one.value, other.value)
