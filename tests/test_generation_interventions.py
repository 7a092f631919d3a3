"""Interventions in a generation: the key-value cache changes nothing about which positions they act at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from hooked_lm.interventions import Intervention
from tests.helpers import tiny_model, tiny_tokens

DYNAMIC: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "use_dynamic_rope": True,
    "dynamic_rope_factor": 3.0,
    "dynamic_rope_original_ctx_len": 6,
}
MODELS: dict[str, dict[str, Any]] = {
    "learned": {},
    "dynamic rotary": DYNAMIC,
    "alibi": {"positional_embedding_type": "alibi"},
    "grouped, window": {
        "positional_embedding_type": "rotary",
        "d_model": 16,
        "d_head": 4,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "use_local_attn": True,
        "window_size": 3,
        "attn_types": ["local", "global"],
    },
    "experts, parallel": {"num_experts": 3, "experts_per_token": 2, "parallel_attn_mlp": True, "gated_mlp": True},
}
# Positions and last entries that count from the end of a pass, and all of them.
SELECTIONS: list[dict[str, Any]] = [
    {"pos": -1},
    {"pos": (-1, 2)},
    {"pos": (0, -2)},
    {"pos": (4, 5)},
    {},
    {"feature": -1},
    {"pos": -1, "feature": -1},
]
N_NEW = 3


def generated(
    model: HookedTransformer, tokens: Tensor, edit: Intervention, use_past_kv_cache: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The text, and the logits of each step, [step batch vocab]."""
    steps: list[Tensor] = []

    def keep(logits: Tensor, hook: HookPoint) -> None:
        steps.append(logits[:, -1].clone())

    model.add_hook("unembed.hook_out", keep)
    try:
        text = model.generate(
            tokens,
            max_new_tokens=N_NEW,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past_kv_cache,
            interventions=[edit],
            attention_mask=mask,
            verbose=False,
        )
    finally:
        model.reset_hooks()
    assert isinstance(text, Tensor)
    return text, torch.stack(steps)


def fitting(model: HookedTransformer, site: str, selection: dict[str, Any]) -> Intervention | None:
    axes = model.hook_dict[site].axes
    if not {"pos", "query"} & set(axes) or site.endswith(("hook_tokens", "hook_expert_indices")):
        return None
    if site.startswith("blocks.1.") or ("feature" in selection and axes[-1] != "key"):
        return None
    return Intervention(site, "add", 1.5, **selection)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_each_step_is_the_same_with_and_without_the_key_value_cache(kind: str, selection: dict[str, Any]) -> None:
    model, tokens = tiny_model(n_ctx=20, **MODELS[kind]), tiny_tokens(batch=2, pos=4)
    n_compared = 0
    for site in model.hook_dict:
        edit = fitting(model, site, selection)
        if edit is None or (site.startswith("unembed") and selection.get("pos") in {(-1, 2), (0, -2)}):
            continue  # a position that is not unembedded
        text, logits = generated(model, tokens, edit, True)
        again, logits_again = generated(model, tokens, edit, False)
        torch.testing.assert_close(logits_again, logits, rtol=0, atol=1e-9, msg=lambda m, s=site: f"{s}: {m}")
        assert torch.equal(text, again)
        n_compared += 1
    assert n_compared >= (2 if "feature" in selection else 18)


@pytest.mark.parametrize("operation", ["replace", "zero", "scale"])
@pytest.mark.parametrize("site", ["hook_attn_scores", "hook_pattern"])
def test_scores_and_patterns_are_edited_for_the_keys_that_had_been_read(site: str, operation: Any) -> None:
    model, tokens = tiny_model(n_ctx=20), tiny_tokens(batch=2, pos=4)
    value = None if operation == "zero" else 0.3
    edit = Intervention(f"blocks.0.attn.{site}", operation, value, head=1)
    torch.testing.assert_close(
        generated(model, tokens, edit, True)[1], generated(model, tokens, edit, False)[1], rtol=0, atol=1e-9
    )


def test_prompts_padded_on_the_left() -> None:
    model, tokens = tiny_model(n_ctx=20), tiny_tokens(batch=2, pos=4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for site in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_attn_scores"):
        edit = Intervention(site, "add", 2.0, pos=-1, feature=-1)
        cached, plain = (generated(model, tokens, edit, how, mask)[1] for how in (True, False))
        torch.testing.assert_close(plain, cached, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_newest_position_of_each_step_is_edited_in_every_later_step() -> None:
    model, tokens = tiny_model(n_ctx=20), tiny_tokens(batch=1, pos=4)
    edit = Intervention("blocks.0.hook_resid_mid", "add", 2.0, pos=-1)
    text, logits = generated(model, tokens, edit, False)
    for step in range(N_NEW):
        every = Intervention(edit.site, "add", 2.0, pos=tuple(range(3, 4 + step)))
        expected = model.run(text[:, : 4 + step], interventions=[every])[:, -1]
        torch.testing.assert_close(logits[step], expected, rtol=0, atol=1e-9)


def test_a_run_that_a_hook_makes_meanwhile_reads_its_own_text() -> None:
    model, other = tiny_model(n_ctx=20), tiny_model(n_ctx=20)
    text = tiny_tokens(batch=1, pos=6)
    last = Intervention("blocks.0.hook_resid_post", "add", 2.0, pos=-1)
    expected, found = other.run(text, interventions=[last]), []

    def run_other(x: Tensor, hook: HookPoint) -> None:
        found.append(other.run(text, interventions=[last]))

    with model.hooks(fwd_hooks=[("hook_embed", run_other)]):
        generated(model, tiny_tokens(batch=1, pos=4), last, False)
    assert len(found) == N_NEW
    assert all(torch.equal(one, expected) for one in found)


def test_a_position_that_is_selected_twice_in_a_pass_is_refused() -> None:
    model = tiny_model(n_ctx=20)
    edit = Intervention("blocks.0.hook_resid_post", "add", 2.0, pos=(-1, 5))
    with pytest.raises(ValueError, match=r"pos=\(-1, 5\) at .* selects an entry of this pass twice"):
        model.run(tiny_tokens(pos=6), interventions=[edit])
    for use_past_kv_cache in (True, False):
        with pytest.raises(ValueError, match="twice"):
            generated(model, tiny_tokens(pos=4), edit, use_past_kv_cache)
    assert model.run(tiny_tokens(pos=7), interventions=[edit]).isfinite().all()
