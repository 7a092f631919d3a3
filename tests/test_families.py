"""Every family against `transformers`: tiny models, every parameter random, every feature within reach."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.family_rows import ROWS, Row

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)

ABSOLUTE, RELATIVE = 1e-4, 1e-5


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Row id -> (transformers model, folder with its checkpoint), made when asked for. Do not write to either."""

    class Checkpoints(dict[str, tuple[Any, Path]]):
        def __missing__(self, row_id: str) -> tuple[Any, Path]:
            row = next(row for row in ROWS if row.id == row_id)
            folder = tmp_path_factory.mktemp(row_id)
            model = row.build()
            model.save_pretrained(folder)
            self[row_id] = model, folder
            return self[row_id]

    return Checkpoints()


def assert_close(ours: Tensor, theirs: Tensor, absolute: float = ABSOLUTE, relative: float = RELATIVE) -> None:
    """The largest difference is within an absolute bound and, relative to the largest value, within another."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= absolute
    assert difference <= relative * max(theirs.abs().max().item(), 1.0)


@rows
@torch.no_grad()
def test_logits_and_residuals_equal_the_reference(row: Row, checkpoints: Any) -> None:
    theirs, folder = checkpoints[row.id]
    ours = HookedTransformer.from_pretrained_no_processing(folder)
    tokens = row.tokens()
    reference = theirs(tokens, output_hidden_states=True)
    logits, cache = ours.run_with_cache(tokens, names_filter="blocks.*.hook_resid_pre")
    for layer in range(ours.cfg.n_layers):
        assert_close(cache["resid_pre", layer], reference.hidden_states[layer])
    assert_close(logits, reference.logits)


@rows
@torch.no_grad()
def test_processing_keeps_the_log_probabilities(row: Row, checkpoints: Any) -> None:
    theirs, folder = checkpoints[row.id]
    ours = HookedTransformer.from_pretrained(folder)
    tokens = row.tokens()
    assert ours.processed
    assert_close(ours(tokens).log_softmax(-1), theirs(tokens).logits.log_softmax(-1))


@pytest.mark.parametrize("row", [row for row in ROWS if row.float64], ids=lambda row: row.id)
@torch.no_grad()
def test_logits_equal_the_reference_in_float64(row: Row, checkpoints: Any) -> None:
    theirs, folder = row.build().double(), checkpoints[row.id][1]
    ours = HookedTransformer.from_pretrained_no_processing(folder, dtype=torch.float64)
    assert_close(ours(row.tokens()), theirs(row.tokens()).logits, absolute=1e-9, relative=1e-9)


@pytest.mark.parametrize(
    ("row", "feature"),
    [pytest.param(row, feature, id=f"{row.id}-{feature}") for row in ROWS for feature in row.features],
)
@torch.no_grad()
def test_every_feature_matters_to_the_reference(row: Row, feature: str) -> None:
    tokens = row.tokens()
    with_it, without = row.build()(tokens).logits, row.build(**row.features[feature])(tokens).logits
    assert (with_it - without).abs().max() > 100 * ABSOLUTE


@rows
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(row: Row, checkpoints: Any, tmp_path: Path) -> None:
    ours = HookedTransformer.from_pretrained(checkpoints[row.id][1])
    ours.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg.replace(model_name=again.cfg.model_name)
    weights = again.state_dict()
    assert weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    # A tensor may lie in memory in another order now, so sums may round otherwise.
    assert_close(again(row.tokens()), ours(row.tokens()))


@rows
def test_the_certificate_passes(row: Row, checkpoints: Any) -> None:
    certificate = verify(checkpoints[row.id][1], positions=row.pos)
    assert certificate.passed, certificate
    assert certificate.exact_in_float64 or not row.float64, certificate


@rows
@torch.no_grad()
def test_an_edited_model_goes_back_to_the_reference(row: Row, checkpoints: Any, tmp_path: Path) -> None:
    ours = HookedTransformer.from_pretrained_no_processing(checkpoints[row.id][1])
    ours.blocks[1].mlp.W_out[..., ::2] += 1.0
    if not row.invertible:
        with pytest.raises(CheckpointError, match="cannot be told apart again"):
            ours.to_huggingface(tmp_path)
        return
    ours.to_huggingface(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=row.attention).eval()
    tokens = row.tokens()
    assert_close(ours(tokens), theirs(tokens).logits)
    assert (ours(tokens) - checkpoints[row.id][0](tokens).logits).abs().max() > 100 * ABSOLUTE


@rows
@torch.no_grad()
def test_a_left_padded_prompt_gives_the_logits_it_has_alone(row: Row, checkpoints: Any) -> None:
    ours = HookedTransformer.from_pretrained_no_processing(checkpoints[row.id][1])
    tokens = row.tokens(batch=2)
    short = tokens[1:, 5:]
    padded = tokens.clone()
    padded[1, :5] = 2
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    both = ours(padded, attention_mask=mask)
    assert_close(both[1:, 5:], ours(short))
    assert_close(both[:1], ours(tokens[:1]))


@rows
@torch.no_grad()
def test_cached_decoding_equals_uncached(row: Row, checkpoints: Any) -> None:
    ours = HookedTransformer.from_pretrained_no_processing(checkpoints[row.id][1])
    tokens = row.tokens()
    cache = ours.new_kv_cache(batch_size=2)
    # Where rotary frequencies depend on how long the prompt is, a cache serves up to where they change.
    end = next((pos for pos in range(4, row.pos) if ours.cfg.rotation_changes(pos, pos + 1)), row.pos)
    stepwise = [ours(tokens[:, :4], past_kv_cache=cache)]
    stepwise += [ours(tokens[:, pos : pos + 1], past_kv_cache=cache) for pos in range(4, end)]
    assert_close(torch.cat(stepwise, 1), ours(tokens[:, :end]))
    generate = partial(ours.generate, tokens, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(generate(), generate(use_past_kv_cache=False))


@rows
@torch.no_grad()
def test_a_checkpoint_in_bfloat16_gives_the_logits_of_the_reference(row: Row, tmp_path: Path) -> None:
    row.build().bfloat16().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=row.attention
    ).eval()
    tokens = row.tokens()
    reference = theirs(tokens).logits
    plain = HookedTransformer.from_pretrained_no_processing(tmp_path, dtype=torch.float32)
    assert_close(plain(tokens), reference)
    # In its own precision it is processed in float32, and rounded once.
    precise, low = (HookedTransformer.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, None))
    assert low.cfg.dtype == torch.bfloat16
    assert low(tokens).isfinite().all()
    rounded = precise.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, rounded[name]) for name, value in low.state_dict().items())
