"""Every family against `transformers`: tiny models, every parameter random, every feature within reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hooked_lm import CheckpointError, HookedTransformer, verify
from tests.family_rows import ROWS, Row
from weight_conversion.registry import family_of

ROW = {row.id: row for row in ROWS}
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)

ABSOLUTE, RELATIVE = 1e-4, 1e-5

Checkpoints = Callable[[str], "Checkpoint"]


class Checkpoint:
    """A row's checkpoint, and what it is read as. Nothing here is to be changed.

    Attributes:
        theirs: the transformers model that it is of.
        folder: where it is.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        self.theirs, self.folder = row.build(), folder
        row.save(self.theirs, folder)

    @cached_property
    def unprocessed(self) -> HookedTransformer:
        return HookedTransformer.from_pretrained_no_processing(self.folder)

    @cached_property
    def processed(self) -> HookedTransformer:
        return HookedTransformer.from_pretrained(self.folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The checkpoint of a row, by its id, made when it is first asked for."""
    return cache(lambda row_id: Checkpoint(ROW[row_id], tmp_path_factory.mktemp(row_id)))


def assert_close(ours: Tensor, theirs: Tensor, absolute: float = ABSOLUTE, relative: float = RELATIVE) -> None:
    """The largest difference is within an absolute bound and, relative to the largest value, within another."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= absolute
    assert difference <= relative * max(theirs.abs().max().item(), 1.0)


# Activations, logits, decoding with a cache, left padding and gradients, in both precisions.
@rows
def test_the_certificate_passes(row: Row, checkpoints: Checkpoints) -> None:
    folder = checkpoints(row.id).folder
    certificate = verify(folder, positions=row.pos, reference=row.reference(folder))
    assert certificate.passed, certificate
    assert certificate.exact_in_float64 or not row.float64, certificate


# Families with a norm after the embedding.
NORMED = {"Bloom", "nanochat", "ModernBERT decoder"}


@rows
@torch.no_grad()
def test_hook_embed_is_a_row_of_w_e_or_its_norm(row: Row, checkpoints: Checkpoints) -> None:
    normed = family_of(row.architecture).name in NORMED
    for ours in (checkpoints(row.id).unprocessed, checkpoints(row.id).processed):
        assert ours.cfg.post_embedding_ln is normed
        looked_up = ours.W_E[row.tokens()]
        embedded = ours.run_with_cache(row.tokens(), names_filter="hook_embed", stop_at_layer=0)[1]["hook_embed"]
        assert torch.equal(embedded, ours.embed.ln(looked_up) if normed else looked_up)
        assert not normed or (embedded - looked_up).abs().max() > 0.1


# Without the certificate's help: it is the logits of the reference that are kept.
@rows
@torch.no_grad()
def test_processing_keeps_the_log_probabilities_of_the_reference(row: Row, checkpoints: Checkpoints) -> None:
    checkpoint, tokens = checkpoints(row.id), row.tokens()
    assert checkpoint.processed.processed
    assert_close(checkpoint.processed(tokens).log_softmax(-1), checkpoint.theirs(tokens).logits.log_softmax(-1))


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
def test_a_saved_model_loads_as_it_was(row: Row, checkpoints: Checkpoints, tmp_path: Path) -> None:
    ours = checkpoints(row.id).processed
    ours.save_pretrained(tmp_path)
    again = HookedTransformer.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg.replace(model_name=again.cfg.model_name)
    weights = again.state_dict()
    assert weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    # A tensor may lie in memory in another order now, so sums may round otherwise.
    assert_close(again(row.tokens()), ours(row.tokens()))


@rows
@torch.no_grad()
def test_an_edited_model_goes_back_to_the_reference(row: Row, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints(row.id)
    ours = HookedTransformer.from_pretrained_no_processing(checkpoint.folder)
    ours.blocks[1].mlp.W_out[..., ::2] += 1.0
    if not row.invertible:
        with pytest.raises(CheckpointError, match="cannot be told apart again"):
            ours.to_huggingface(tmp_path)
        return
    ours.to_huggingface(tmp_path)
    theirs, tokens = row.load(tmp_path), row.tokens()
    assert_close(ours(tokens), theirs(tokens).logits)
    assert (ours(tokens) - checkpoint.theirs(tokens).logits).abs().max() > 100 * ABSOLUTE


@rows
@torch.no_grad()
def test_generation_with_a_cache_equals_that_without(row: Row, checkpoints: Checkpoints) -> None:
    generate = partial(
        checkpoints(row.id).unprocessed.generate,
        row.tokens(),
        max_new_tokens=4,
        do_sample=False,
        stop_at_eos=False,
        verbose=False,
    )
    assert torch.equal(generate(), generate(use_past_kv_cache=False))


@rows
@torch.no_grad()
def test_a_checkpoint_in_bfloat16_gives_the_logits_of_the_reference(row: Row, tmp_path: Path) -> None:
    row.save(row.build().bfloat16(), tmp_path)
    theirs, tokens = row.load(tmp_path, dtype=torch.float32), row.tokens()
    reference = theirs(tokens).logits
    plain = HookedTransformer.from_pretrained_no_processing(tmp_path, dtype=torch.float32)
    assert_close(plain(tokens), reference)
    # In its own precision it is processed in float32, and rounded once.
    precise, low = (HookedTransformer.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, None))
    assert low.cfg.dtype == torch.bfloat16
    assert low(tokens).isfinite().all()
    rounded = precise.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, rounded[name]) for name, value in low.state_dict().items())
