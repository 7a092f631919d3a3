"""Under `logits_to_keep`, positions at the unembedding are those of the text, as everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookPoint, Intervention
from tests.helpers import tiny_model, tiny_tokens

SITES = ("unembed.hook_in", "unembed.hook_out")
KEEP: tuple[Any, ...] = (1, 3, slice(1, 6, 2), torch.tensor([4, 0, -1]), torch.tensor([2, 5, 2]))


def kept_of(keep: Any, n_pos: int) -> list[int]:
    index = slice(-keep, None) if isinstance(keep, int) else keep
    return torch.arange(n_pos)[index].tolist()


@torch.no_grad()
@pytest.mark.parametrize("keep", KEEP, ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pos", [0, 2, 4, 5, 6, -1, -2, (0, 4), (-1, 2, 5)])
def test_an_edit_acts_at_the_positions_it_names_or_never_acted(site: str, pos: Any, keep: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 7)
    edit = Intervention(site, "scale", 3.0, pos=pos)
    whole = model.run(tokens, interventions=[edit])
    kept = kept_of(keep, 7)
    wanted = [one % 7 for one in (pos if isinstance(pos, tuple) else (pos,))]
    if set(wanted) <= set(kept):
        came = model.run(tokens, interventions=[edit], logits_to_keep=keep)
        torch.testing.assert_close(came, whole[:, kept], rtol=0, atol=1e-12)
        return
    with pytest.raises(RuntimeError, match="never acted"):
        model.run(tokens, interventions=[edit], logits_to_keep=keep)
    with model.intervening([edit]):
        torch.testing.assert_close(model(tokens, logits_to_keep=keep), whole[:, kept], rtol=0, atol=1e-12)


@torch.no_grad()
def test_each_position_of_an_edit_gets_its_own_value() -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 7)
    edit = Intervention("unembed.hook_in", "replace", torch.randn(2, 3, 12, dtype=torch.float64), pos=(6, 1, 4))
    whole = model.run(tokens, interventions=[edit])
    came = model.run(tokens, interventions=[edit], logits_to_keep=torch.tensor([4, 6, 1, 0]))
    torch.testing.assert_close(came, whole[:, [4, 6, 1, 0]], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("keep", KEEP, ids=str)
def test_a_cache_keeps_the_same_positions_at_the_final_norm_and_at_the_unembedding(keep: Any, lazy: bool) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 7)
    _, full = model.run_with_cache(tokens)
    kept = kept_of(keep, 7)
    names = ["ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"]
    for pos_slice in (kept[-1], kept[:1], kept[::-1] if len(set(kept)) == len(kept) else kept[:1]):
        _, cache = model.run_with_cache(tokens, names_filter=names, pos_slice=pos_slice, logits_to_keep=keep, lazy=lazy)
        for name in names:
            index = [pos_slice] if isinstance(pos_slice, int) else pos_slice
            torch.testing.assert_close(cache[name], full[name][:, index], rtol=0, atol=1e-12)
    left_out = next(one for one in range(7) if one not in kept)

    def ask() -> None:
        options: dict[str, Any] = {"names_filter": names, "pos_slice": [left_out], "logits_to_keep": keep, "lazy": lazy}
        dict(model.run_with_cache(tokens, **options)[1])

    with pytest.raises(ValueError, match=rf"pos_slice selects position {left_out}, and 'unembed.hook_in' has only"):
        ask()


@torch.no_grad()
@pytest.mark.parametrize("pos", [4, 6, -1])
def test_generation_edits_the_unembedding_as_the_whole_text_read_at_once_does(pos: int) -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    edit = Intervention("unembed.hook_in", "scale", -1.0, pos=pos)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    text = tokens
    for _ in range(4):
        # One pass over the text so far, in which -1 is the newest position.
        with model.intervening([edit]):
            text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
    for use_past_kv_cache in (True, False):
        came = model.generate(tokens, interventions=[edit], use_past_kv_cache=use_past_kv_cache, **how)
        assert torch.equal(came, text)


@torch.no_grad()
def test_a_plain_hook_is_shown_the_kept_positions_only() -> None:
    model, shapes = tiny_model(), []

    def look(x: Tensor, hook: HookPoint) -> None:
        shapes.append(tuple(x.shape))

    model.run_with_hooks(tiny_tokens(2, 7), fwd_hooks=[("unembed.hook_in", look)], logits_to_keep=2)
    assert shapes == [(2, 2, 12)]
