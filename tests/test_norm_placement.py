"""Where the norms of a block stand: what is read and written, what the stream is a sum of, what that allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer
from hooked_lm.config import NORM_PLACEMENTS
from tests.helpers import tiny_model, tiny_tokens

TOKENS = tiny_tokens()
ADDITIVE = ("before", "before_and_after", "after")
Mapping = Callable[[Tensor], Tensor]

every_placement = pytest.mark.parametrize("placement", NORM_PLACEMENTS)
every_additive_placement = pytest.mark.parametrize("placement", ADDITIVE)


def model_of(placement: str, **changes: Any) -> HookedTransformer:
    return tiny_model(norm_placement=placement, **changes)


def run(model: HookedTransformer) -> tuple[Tensor, ActivationCache]:
    with torch.no_grad():
        return model.run_with_cache(TOKENS)


def layer_norm(model: HookedTransformer, module: str) -> Mapping:
    """The layer norm of that name, from its parameters alone."""
    w, b = (model.get_parameter(f"{module}.{part}") for part in "wb")
    return lambda x: F.layer_norm(x, x.shape[-1:], w, b, model.cfg.eps)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def norms_of(model: HookedTransformer) -> set[str]:
    """The modules of block 0, and after the blocks, that have a gain."""
    names = (name.removesuffix(".w") for name, _ in model.named_parameters() if name.endswith(".w"))
    return {name.removeprefix("blocks.0.") for name in names if "blocks.1" not in name}


# Which norms there are


@pytest.mark.parametrize(
    ("placement", "changes", "expected"),
    [
        ("before", {}, {"ln1", "ln2", "ln_final"}),
        ("before_and_after", {}, {"ln1", "ln1_post", "ln2", "ln2_post", "ln_final"}),
        ("after", {}, {"ln1_post", "ln2_post", "ln_final"}),
        ("residual", {}, {"ln1", "ln2", "ln_final"}),
        ("residual", {"final_norm": False}, {"ln1", "ln2"}),
        ("after", {"final_norm": False}, {"ln1_post", "ln2_post"}),
        ("residual", {"attn_only": True}, {"ln1", "ln_final"}),
        ("after", {"attn_only": True}, {"ln1_post", "ln_final"}),
        ("after", {"parallel_attn_mlp": True}, {"ln1_post", "ln2_post", "ln_final"}),
    ],
)
def test_a_placement_has_its_norms_and_no_others(placement: str, changes: dict[str, Any], expected: set[str]) -> None:
    assert norms_of(model_of(placement, **changes)) == expected


@pytest.mark.parametrize(
    ("placement", "with_gain"),
    [
        ("before", set()),
        ("before_and_after", {"ln1_post", "ln2_post"}),
        ("after", {"ln1_post", "ln2_post"}),
        ("residual", {"ln1", "ln2"}),
    ],
)
@pytest.mark.parametrize("kind", ["LNPre", "RMSPre"])
def test_a_folded_model_keeps_the_gains_of_norms_that_the_stream_goes_on_through(
    placement: str, with_gain: set[str], kind: str
) -> None:
    assert norms_of(model_of(placement, normalization_type=kind)) == with_gain


def test_the_old_switch_is_another_name_for_norms_before_and_after() -> None:
    assert model_of("before_and_after").cfg == tiny_model(use_normalization_before_and_after=True).cfg


@every_placement
def test_without_norms_the_placement_makes_no_difference(placement: str) -> None:
    logits, _ = run(model_of(placement, normalization_type=None))
    assert torch.equal(logits, run(model_of("before", normalization_type=None))[0])


def test_each_placement_computes_something_else() -> None:
    logits = [run(model_of(placement))[0] for placement in NORM_PLACEMENTS]
    for i in range(len(logits)):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 1e-2


# What is read and what is written


@every_placement
def test_attention_and_mlp_read_the_normalised_stream_or_the_stream_itself(placement: str) -> None:
    model = model_of(placement)
    _, cache = run(model)
    for layer, block in enumerate(model.blocks):
        attn_in, mlp_in = cache["resid_pre", layer], cache["resid_mid", layer]
        if placement.startswith("before"):
            attn_in = layer_norm(model, f"blocks.{layer}.ln1")(attn_in)
            mlp_in = layer_norm(model, f"blocks.{layer}.ln2")(mlp_in)
        for letter in "qkv":
            W, b = (getattr(block.attn, f"{part}_{letter.upper()}") for part in "Wb")
            assert_same(cache[letter, layer], torch.stack([attn_in @ W[head] + b[head] for head in range(3)], 2))
        assert_same(cache["pre", layer], mlp_in @ block.mlp.W_in + block.mlp.b_in)


@every_placement
def test_what_attention_and_mlp_write_is_normalised_where_the_norms_are_after_them(placement: str) -> None:
    model = model_of(placement)
    _, cache = run(model)
    for layer, block in enumerate(model.blocks):
        attn_out = torch.einsum("bphe,hed->bpd", cache["z", layer], block.attn.W_O) + block.attn.b_O
        mlp_out = cache["post", layer] @ block.mlp.W_out + block.mlp.b_out
        if placement.endswith("after"):
            attn_out = layer_norm(model, f"blocks.{layer}.ln1_post")(attn_out)
            mlp_out = layer_norm(model, f"blocks.{layer}.ln2_post")(mlp_out)
        assert_same(cache["attn_out", layer], attn_out)
        assert_same(cache["mlp_out", layer], mlp_out)


@every_placement
def test_the_stream_is_a_sum_unless_the_norms_are_on_it(placement: str) -> None:
    model = model_of(placement)
    _, cache = run(model)
    for layer in range(2):
        mid = cache["resid_pre", layer] + cache["attn_out", layer]
        post = cache["resid_mid", layer] + cache["mlp_out", layer]
        if placement == "residual":
            mid, post = layer_norm(model, f"blocks.{layer}.ln1")(mid), layer_norm(model, f"blocks.{layer}.ln2")(post)
        assert_same(cache["resid_mid", layer], mid)
        assert_same(cache["resid_post", layer], post)


def test_an_attention_only_block_with_norms_on_the_stream_ends_in_one() -> None:
    model = model_of("residual", attn_only=True)
    _, cache = run(model)
    for layer in range(2):
        total = cache["resid_pre", layer] + cache["attn_out", layer]
        assert_same(cache["resid_post", layer], layer_norm(model, f"blocks.{layer}.ln1")(total))


def test_parallel_blocks_add_two_normalised_outputs() -> None:
    model = model_of("after", parallel_attn_mlp=True)
    _, cache = run(model)
    for layer, block in enumerate(model.blocks):
        assert_same(cache["pre", layer], cache["resid_pre", layer] @ block.mlp.W_in + block.mlp.b_in)
        total = cache["resid_pre", layer] + cache["attn_out", layer] + cache["mlp_out", layer]
        assert_same(cache["resid_post", layer], total)


@every_placement
def test_without_a_final_norm_logits_are_read_from_the_stream_itself(placement: str) -> None:
    model = model_of(placement, final_norm=False)
    logits, cache = run(model)
    assert_same(logits, cache["resid_post", 1] @ model.W_U + model.b_U)
    assert "ln_final.hook_scale" not in model.hook_dict


@every_placement
def test_cached_decoding_equals_uncached(placement: str) -> None:
    model = model_of(placement)
    cache = model.new_kv_cache(2)
    with torch.no_grad():
        pieces = [model(TOKENS[:, start:stop], past_kv_cache=cache) for start, stop in ((0, 3), (3, 4), (4, 7))]
        assert_same(torch.cat(pieces, 1), model(TOKENS))


@every_placement
def test_running_in_two_halves_is_running_once(placement: str) -> None:
    model = model_of(placement)
    with torch.no_grad():
        half = model(TOKENS, stop_at_layer=1)
        assert torch.equal(model(half, start_at_layer=1), model(TOKENS))


# Taking the stream apart


@every_additive_placement
@pytest.mark.parametrize("layer", [1, None])
def test_what_the_layers_write_sums_to_the_stream(placement: str, layer: int | None) -> None:
    _, cache = run(model_of(placement))
    stream = cache["resid_post", 1] if layer is None else cache["resid_pre", layer]
    assert_same(cache.decompose_resid(layer).sum(0), stream)


@every_additive_placement
def test_scaled_as_the_reader_scales_the_parts_still_sum_to_what_it_reads(placement: str) -> None:
    model = model_of(placement)
    _, cache = run(model)
    final = cache.decompose_resid(apply_ln=True).sum(0)
    assert_same(final, cache["ln_final.hook_normalized"] * model.get_parameter("ln_final.w"))
    before_block = cache.decompose_resid(1, apply_ln=True).sum(0)
    # With norms only after, block 1 reads the stream as it is.
    reads = cache["resid_pre", 1] if placement == "after" else cache["normalized", 1, "ln1"] * model.blocks[1].ln1.w
    assert_same(before_block, reads)
    before_mlp = cache.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0)
    reads = cache["resid_mid", 1] if placement == "after" else cache["normalized", 1, "ln2"] * model.blocks[1].ln2.w
    assert_same(before_mlp, reads)


def test_a_normalised_stream_is_no_sum_and_says_so() -> None:
    _, cache = run(model_of("residual"))
    with pytest.raises(ValueError, match="no sum of the layers' outputs; accumulated_resid gives the stream"):
        cache.decompose_resid()


@pytest.mark.parametrize("placement", ["before_and_after", "after", "residual"])
def test_where_writes_are_normalised_heads_and_neurons_do_not_split_and_say_so(placement: str) -> None:
    model = model_of(placement)
    _, cache = run(model)
    for split in (
        cache.stack_head_results,
        lambda: cache.stack_neuron_results(None),
        lambda: cache.get_neuron_results(0),
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(ValueError, match="does not split into what each of them adds"):
            split()
    with pytest.raises(ValueError, match="this model normalises biases before they reach the stream"):
        model.accumulated_bias(1)


@pytest.mark.parametrize("changes", [{}, {"final_norm": False}])
def test_the_logit_lens_of_a_normalised_stream_applies_the_final_norm_there_is(changes: dict[str, Any]) -> None:
    model = model_of("residual", **changes)
    logits, cache = run(model)
    streams = [cache["resid_pre", 0], cache["resid_mid", 0], cache["resid_pre", 1], cache["resid_mid", 1]]
    streams.append(cache["resid_post", 1])
    lens = cache.accumulated_resid(incl_mid=True, apply_ln=True)
    for got, stream in zip(lens, streams, strict=True):
        assert_same(got, stream if changes else layer_norm(model, "ln_final")(stream))
    assert_same(lens[-1] @ model.W_U + model.b_U, logits)
    # What block 1 reads of such a stream is the stream.
    assert_same(cache.accumulated_resid(1, apply_ln=True)[-1], cache["resid_pre", 1])
    assert_same(cache.accumulated_resid(1, mlp_input=True, apply_ln=True)[-1], cache["resid_mid", 1])


# Attributions add up to logits, whatever is between


@every_additive_placement
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logit_scale": 0.25},
        {"logit_scale": 4.0, "tie_word_embeddings": True, "embedding_scale": 3.0},
        {"logit_scale": 0.25, "final_norm": False},
        {"logit_scale": 0.25, "positional_embedding_type": "rotary", "attention_sinks": True, "clip_qkv": 0.5},
    ],
)
def test_attributions_sum_to_the_logit_difference(placement: str, changes: dict[str, Any]) -> None:
    # An RMS norm has no bias, so that only the unembedding's belongs to no component.
    model = model_of(placement, normalization_type="RMS", **changes)
    logits, cache = run(model)
    right, wrong = torch.tensor([3, 11]), torch.tensor([8, 2])
    rows = torch.arange(2)
    difference = logits[rows, :, right] - logits[rows, :, wrong]
    biases = model.cfg.logit_scale * (model.b_U[right] - model.b_U[wrong])
    attributions = cache.logit_attrs(cache.decompose_resid(), right, wrong)
    assert_same(attributions.sum(0) + biases[:, None], difference)
    if placement == "before":
        by_head = cache.logit_attrs(cache.stack_head_results(incl_remainder=True), right, wrong)
        assert_same(by_head.sum(0) + biases[:, None], difference)
        # Neurons one by one, where there are plain MLPs.
        whole = cache.logit_attrs(cache.get_full_resid_decomposition(), right, wrong)
        assert_same(whole.sum(0) + biases[:, None], difference)


def test_of_a_normalised_stream_the_last_one_still_gives_the_logit_difference() -> None:
    model = model_of("residual", logit_scale=0.25, normalization_type="RMS")
    logits, cache = run(model)
    last = cache.logit_attrs(cache["resid_post", 1][None], 3, 8)[0]
    assert_same(last + 0.25 * (model.b_U[3] - model.b_U[8]), logits[..., 3] - logits[..., 8])


def test_a_direction_raises_its_logit_by_the_logit_scale() -> None:
    model = model_of("before", logit_scale=0.25)
    assert_same(model.tokens_to_residual_directions(5), 0.25 * model.W_U[:, 5])
    bigger = model.tokens_to_residual_directions(torch.tensor([[1, 2], [3, 4]]))
    assert_same(bigger[1, 0], 0.25 * model.W_U[:, 3])
