"""The logit lens reads every stream as the model reads its last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import parametrize

from hooked_lm import HookedTransformer
from hooked_lm.circuits import logit_lens as module
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.circuits.logit_lens import SITES, LogitLens, logit_lens, read_out
from hooked_lm.components import LayerNorm, Unembed
from tests.helpers import VOCAB, LargestTensor, tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

MODELS: dict[str, dict[str, Any]] = {
    "layer norm": {},
    "folded": {"normalization_type": "LNPre"},
    "RMS norm, gated, grouped, rotary": {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "n_heads": 6,
        "d_head": 4,
        "n_key_value_heads": 2,
    },
    "norms before and after": {"norm_placement": "before_and_after"},
    "norms on the stream": {"norm_placement": "residual", "final_norm": False},
    "no norm": {"normalization_type": None},
    "capped and scaled logits": {"output_logits_soft_cap": 1.5, "logit_scale": 0.7},
    "parallel": {"parallel_attn_mlp": True},
    "attention-only": {"attn_only": True},
    "a layer before the unembedding": {"unembed_act_fn": "silu"},
    "tied": {"tie_word_embeddings": True},
    "mixture of experts": {"num_experts": 4, "experts_per_token": 2},
    "bfloat16": {"dtype": torch.bfloat16},
}
models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)


@torch.no_grad()
def cut_after(model: HookedTransformer, n_layers: int, tokens: torch.Tensor, without_mlp: bool = False) -> torch.Tensor:
    """The logits of a model that is the first `n_layers` of another, the last one's MLP silent if asked."""
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < n_layers
    }
    short = HookedTransformer(model.cfg.replace(n_layers=n_layers))
    short.load_state_dict(weights)
    if without_mlp:
        for name in ("W_out", "b_out"):
            getattr(short.blocks[-1].mlp, name).zero_()
    return short(tokens)


def all_log_probs(lens: LogitLens, site: int, vocab: int = 20) -> torch.Tensor:
    """[batch pos vocab] from a lens that kept all tokens."""
    return torch.empty(*lens.tokens.shape, vocab, dtype=lens.kl.dtype).scatter(
        -1, lens.top_tokens[site], lens.top_log_probs[site]
    )


# What is read


@models
@pytest.mark.parametrize("block", [None, 3])
def test_the_last_site_is_the_models_own_output_exactly(changes: dict[str, Any], block: int | None) -> None:
    model, tokens = tiny_model(**changes), tiny_tokens()
    lens = logit_lens(model, tokens, top_k=20, block=block)
    with torch.no_grad():
        expected = log_probs(model(tokens))
    assert torch.equal(all_log_probs(lens, -1), expected)
    assert lens.labels[-1] == "1_post"
    assert bool((lens.kl[-1] == 0).all())


@models
def test_each_layer_says_what_the_model_cut_there_says(changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(n_layers=3, **changes), tiny_tokens()
    lens = logit_lens(model, tokens, top_k=20)
    tolerance = {"atol": 3e-2, "rtol": 3e-2} if model.cfg.dtype == torch.bfloat16 else {}
    for n_layers in (1, 2, 3):
        cut = log_probs(cut_after(model, n_layers, tokens))
        torch.testing.assert_close(all_log_probs(lens, lens.labels.index(f"{n_layers - 1}_post")), cut, **tolerance)
        if n_layers < 3:
            torch.testing.assert_close(all_log_probs(lens, lens.labels.index(f"{n_layers}_pre")), cut, **tolerance)


def test_between_attention_and_mlp_it_says_what_the_model_without_that_mlp_says() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    lens = logit_lens(model, tokens, top_k=20)
    for layer in (0, 1):
        cut = cut_after(model, layer + 1, tokens, without_mlp=True).log_softmax(-1)
        torch.testing.assert_close(all_log_probs(lens, lens.labels.index(f"{layer}_mid")), cut)


def test_the_first_site_reads_the_embeddings_by_the_equations() -> None:
    model, tokens = tiny_model(logit_scale=0.7, output_logits_soft_cap=1.5), tiny_tokens()
    x = model.W_E[tokens] + model.W_pos[:7]
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = 0.7 * ((x * model.ln_final.w + model.ln_final.b) @ model.W_U + model.b_U)
    expected = (1.5 * torch.tanh(logits / 1.5)).log_softmax(-1)
    torch.testing.assert_close(all_log_probs(logit_lens(model, tokens, top_k=20), 0), expected.detach())


def test_entropy_divergence_ranks_and_probabilities_are_those_of_the_distributions() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    targets = tiny_tokens(seed=3)
    lens = logit_lens(model, tokens, targets=targets, top_k=20)
    final = Categorical(logits=all_log_probs(lens, -1))
    for site in range(len(lens.labels)):
        here = Categorical(logits=all_log_probs(lens, site))
        torch.testing.assert_close(lens.entropy[site], here.entropy())
        torch.testing.assert_close(lens.kl[site], kl_divergence(final, here))
        order = here.logits.argsort(-1, descending=True)
        assert torch.equal(lens.top_tokens[site], order)
        assert torch.equal(lens.target_ranks[site], (order == targets[..., None]).long().argmax(-1, keepdim=True))
        torch.testing.assert_close(lens.target_probs[site][..., 0], here.log_prob(targets).exp())
        torch.testing.assert_close(lens.top_probs[site].sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert float(lens.kl[:-1].min()) > 1e-3


def test_read_out_shows_nothing_to_the_hooks() -> None:
    model = tiny_model()
    seen = []
    with model.hooks(fwd_hooks=[(["ln_final.hook_normalized", "unembed.hook_out"], lambda x, hook: seen.append(hook))]):
        read_out(model, torch.randn(3, 4, 12, dtype=torch.float64))
        assert not seen
        logit_lens(model, tiny_tokens())
    assert len(seen) == 2  # those of the model's own end


# How it is read


@pytest.mark.parametrize("block", [1, 4, 5, 1000])
def test_readings_are_the_same_in_blocks_of_any_size(block: int) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    whole, blocks = (logit_lens(model, tokens, targets=[3, 4], block=size) for size in (None, block))
    for field in dataclasses.fields(LogitLens):
        expected, came = getattr(whole, field.name), getattr(blocks, field.name)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(came, expected)


@pytest.mark.parametrize(("block", "at_a_time"), [(2, [2] * 7), (5, [5, 5, 4]), (None, [4, 4, 4, 2])])
def test_the_logits_of_all_sites_are_never_held(
    monkeypatch: pytest.MonkeyPatch, block: int | None, at_a_time: list[int]
) -> None:
    monkeypatch.setattr(module, "_NUMBERS_PER_BLOCK", 4 * 20)  # what a block holds by default
    read: list[int] = []

    def spy(model: HookedTransformer, resid: torch.Tensor) -> torch.Tensor:
        read.append(len(resid))
        return read_out(model, resid)

    monkeypatch.setattr(module, "read_out", spy)
    logit_lens(tiny_model(), tiny_tokens(), block=block, layers=[0], sites="resid_mid")
    assert read == at_a_time  # 14 positions in all, at one site: the last one is the model's own output


def test_logits_of_positions_that_were_not_asked_for_are_not_made() -> None:
    model, tokens = tiny_model(d_vocab=1000), tiny_tokens(batch=4, pos=10)
    with LargestTensor() as largest:
        logit_lens(model, tokens, positions=[-1])
    assert largest.numbers == 1000 * 12  # the unembedding; the logits of all positions would be 40,000


def test_a_stream_that_was_edited_on_its_way_is_read_anew() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    plain = logit_lens(model, tokens)
    assert torch.equal(plain.kl[plain.labels.index("0_post")], plain.kl[plain.labels.index("1_pre")])
    edit = ("blocks.1.hook_resid_pre", lambda x, hook: x.flip(-1))
    with model.hooks(fwd_hooks=[edit]):
        edited = logit_lens(model, tokens, top_k=20)
        with torch.no_grad():
            output = model(tokens)
    assert torch.equal(all_log_probs(edited, -1), output.log_softmax(-1))
    assert not torch.equal(edited.kl[edited.labels.index("0_post")], edited.kl[edited.labels.index("1_pre")])
    assert torch.equal(edited.entropy[:3], plain.entropy[:3])
    assert not torch.equal(edited.entropy[3], plain.entropy[3])


def test_no_gradients_are_kept() -> None:
    assert not logit_lens(tiny_model(), tiny_tokens()).kl.requires_grad


def test_a_lens_is_frozen() -> None:
    lens = logit_lens(tiny_model(), tiny_tokens())
    with pytest.raises(dataclasses.FrozenInstanceError):
        lens.labels = ()  # type: ignore[misc]


# What is asked for


def test_sites_come_in_order_of_depth_and_the_end_of_the_model_is_always_among_them() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    everything = logit_lens(model, tokens)
    assert everything.labels == ("0_pre", "0_mid", "0_post", "1_pre", "1_mid", "1_post")
    some = logit_lens(model, tokens, sites=["resid_mid", "resid_pre"])
    assert some.labels == ("0_pre", "0_mid", "1_pre", "1_mid", "1_post")
    assert torch.equal(some.kl, everything.kl[[0, 1, 3, 4, 5]])
    first = logit_lens(model, tokens, sites="resid_post", layers=[0])
    assert first.labels == ("0_post", "1_post")
    assert torch.equal(first.kl, everything.kl[[2, 5]])
    assert logit_lens(tiny_model(parallel_attn_mlp=True), tokens).labels == ("0_pre", "0_post", "1_pre", "1_post")


@pytest.mark.parametrize(
    ("positions", "kept"), [(-1, [6]), ([0, 5], [0, 5]), ((2, 4), [2, 3]), (slice(None, None, 3), [0, 3, 6])]
)
def test_positions_are_those_asked_for(positions: object, kept: list[int]) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    everything, some = logit_lens(model, tokens), logit_lens(model, tokens, positions=positions)
    assert some.positions.tolist() == kept
    assert torch.equal(some.tokens, tokens[:, kept])
    torch.testing.assert_close(some.kl, everything.kl[:, :, kept])
    assert torch.equal(some.top_tokens, everything.top_tokens[:, :, kept])


def test_targets_may_be_given_once_or_for_each_position() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    one, several = logit_lens(model, tokens, targets=3), logit_lens(model, tokens, targets=[3, 5])
    everywhere = logit_lens(model, tokens, targets=torch.tensor([3, 5]).expand(2, 7, 2))
    assert several.targets.shape == (2, 7, 2)
    assert torch.equal(several.target_ranks, everywhere.target_ranks)
    assert torch.equal(several.target_log_probs[..., :1], one.target_log_probs)
    assert torch.equal(several.target_log_probs[-1], log_probs(model(tokens).detach())[..., [3, 5]])
    assert logit_lens(model, tokens).targets.shape == (2, 7, 0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_left_blank_and_each_prompt_reads_as_it_does_alone(padding_side: str) -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    model.set_tokenizer(tiny_tokenizer())
    short, long = "John gave a drink", "The capital of France is Paris, and the capital"
    both = logit_lens(model, [short, long], padding_side=padding_side, targets="Par")
    alone = logit_lens(model, short, targets="Par")
    n_real, n_pos = alone.tokens.shape[1], both.tokens.shape[1]
    real = slice(n_pos - n_real, None) if padding_side == "left" else slice(n_real)
    blank = slice(n_pos - n_real) if padding_side == "left" else slice(n_real, None)
    assert n_real < n_pos
    for name in ("kl", "entropy", "top_log_probs", "target_log_probs", "target_ranks", "top_tokens"):
        came, expected = getattr(both, name)[:, 0], getattr(alone, name)[:, 0]
        torch.testing.assert_close(came[:, real], expected)
        empty = came[:, blank]
        assert bool((empty.isnan() if empty.is_floating_point() else empty == -1).all())
    assert torch.equal(both.tokens[0, real], alone.tokens[0])
    assert both.tokens[0, blank].tolist() == [-1] * (n_pos - n_real)
    assert not bool(both.kl[:, 1].isnan().any())
    assert len([row for row in both.rows() if row["prompt"] == 0]) == n_real * len(both.labels)


@pytest.mark.parametrize(
    ("changes", "call", "said"),
    [
        ({"attn_only": True}, {"sites": ["resid_mid"]}, "attention-only and parallel blocks have no resid_mid"),
        ({}, {"sites": ["resid_end"]}, "sites are some of resid_pre, resid_mid, resid_post; got"),
        ({}, {"sites": []}, "sites are some of"),
        ({}, {"layers": [2]}, "layers are some of 0-1"),
        ({}, {"layers": [-1]}, "layers are some of 0-1"),
        ({}, {"top_k": 21}, "top_k is in 1-20"),
        ({}, {"top_k": 0}, "top_k is in 1-20"),
        ({}, {"block": 0}, "block at least 1"),
        ({}, {"positions": (7, 9)}, "pick none of the 7"),
        ({}, {"targets": 20}, "tokens 0-19, got 20"),
        ({}, {"targets": [-1, 3]}, "tokens 0-19, got -1"),
        ({}, {"targets": torch.zeros(2, dtype=torch.long)}, "with batch 2 and pos 7"),
        ({}, {"targets": torch.zeros(2, 6, dtype=torch.long)}, "with batch 2 and pos 7"),
        ({}, {"targets": torch.zeros(2, 7)}, "with batch 2 and pos 7"),
        ({}, {"targets": "Par"}, "no tokenizer"),
        ({"n_layers": 0}, {}, "this model has none"),
    ],
)
def test_what_cannot_be_asked_raises(changes: dict[str, Any], call: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        logit_lens(tiny_model(**changes), tiny_tokens(), **call)


# For people


def speller() -> HookedTransformer:
    """A model that says the token it sees until its MLP makes it say the next one."""
    model = HookedTransformer(
        tiny_config(
            n_layers=1,
            d_model=20,
            n_heads=2,
            d_head=4,
            d_mlp=20,
            act_fn="relu",
            normalization_type=None,
            positional_embedding_type="none",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(10 * torch.eye(20))
        model.unembed.W_U.copy_(torch.eye(20))
        model.blocks[0].mlp.W_in.copy_(torch.eye(20))
        model.blocks[0].mlp.W_out.copy_(2 * torch.eye(20).roll(1, dims=1))
    return model


def test_the_table_shows_the_likeliest_token_of_each_site_the_last_on_top() -> None:
    lens = logit_lens(speller(), torch.tensor([[3, 7]]))
    assert lens.strings is None
    lines = [line.split() for line in str(lens).splitlines()]
    assert lines == [
        ["0", "3", "1", "7"],
        ["0_post", "4", "100%", "8", "100%"],
        ["0_mid", "3", "100%", "7", "100%"],
        ["0_pre", "3", "100%", "7", "100%"],
    ]
    with pytest.raises(ValueError, match="no prompt 1"):
        lens.table(1)


def test_rows_hold_one_reading_each_with_numbers_that_are_known() -> None:
    lens = logit_lens(speller(), torch.tensor([[3, 7]]), targets=[4], positions=[1])
    rest = 19 + torch.tensor(10.0, dtype=torch.float64).exp()
    first, *_, last = lens.rows()
    assert len(lens.rows()) == 3
    assert (first["site"], first["prompt"], first["pos"], first["token"], first["top"]) == ("0_pre", 0, 1, "7", "7")
    assert first["top_prob"] == pytest.approx(float(1 - 19 / rest))
    assert (first["target_0"], first["target_0_rank"]) == ("4", 1)
    assert first["target_0_prob"] == pytest.approx(float(1 / rest))
    assert (last["site"], last["top"], last["kl"]) == ("0_post", "8", 0.0)


def test_with_a_tokenizer_tokens_are_shown_as_strings() -> None:
    model = tiny_model(d_vocab=VOCAB, n_ctx=64)
    model.set_tokenizer(tiny_tokenizer())
    lens = logit_lens(model, "Mary went", targets=["Par"])
    assert lens.strings is not None
    shown = [str(row["token"]) for row in lens.rows() if row["site"] == "0_pre"]
    assert shown == [repr(one) for one in model.to_str_tokens("Mary went")]
    assert lens.rows()[0]["target_0"] == "'Par'"
    assert lens.rows()[0]["top"] == repr(model.to_single_str_token(int(lens.top_tokens[0, 0, 0, 0])))
    assert f"1 {shown[1]}" in lens.table().splitlines()[0]


def test_the_progress_bar_shows_unless_it_is_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    logit_lens(tiny_model(), tiny_tokens(), verbose=False)
    assert capsys.readouterr().err == ""
    logit_lens(tiny_model(), tiny_tokens())
    assert "logit lens" in capsys.readouterr().err


# A trained model


def in_the_repeat(lens: LogitLens, label: str) -> float:
    """How often the right token is the likeliest, over the repeat but its first and last position."""
    ranks = lens.target_ranks[lens.labels.index(label), :, 13:24, 0]
    return float((ranks == 0).float().mean())


@pytest.mark.parametrize("ablate", [False, True])
def test_in_the_demo_model_the_repeat_is_known_after_the_induction_head_and_not_before(ablate: bool) -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    tokens = repeated_random_tokens(8, 12, model.cfg.d_vocab, torch.Generator().manual_seed(0))

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return z.index_fill(2, torch.tensor([1]), 0.0)

    hooks: list[tuple[str, Callable[..., Any]]] = [("blocks.1.attn.hook_z", silence)] if ablate else []
    with model.hooks(fwd_hooks=hooks):
        lens = logit_lens(model, tokens, targets=tokens.roll(-1, dims=1), verbose=False)
    assert in_the_repeat(lens, "1_pre") < 0.1
    assert (in_the_repeat(lens, "1_post") > 0.95) is not ablate


# Overridden modules at the end of the model


class LouderUnembed(Unembed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x) + x.sum(-1, keepdim=True)


class ShiftedNorm(LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh() + 0.3


class Doubled(torch.nn.Module):
    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return 2.0 * weights


def as_class(module: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    module.__class__ = kind


def replaced_final_norm(model: HookedTransformer) -> None:
    norm = torch.nn.Linear(model.cfg.d_model, model.cfg.d_model, dtype=torch.float64)
    model.ln_final = norm.requires_grad_(False)


def method_on_the_instance(model: HookedTransformer) -> None:
    forward = model.unembed.forward
    model.unembed.forward = lambda x: forward(x).sin()  # type: ignore[method-assign]


OVERRIDES: dict[str, Callable[[HookedTransformer], Any]] = {
    "a subclass of the unembedding": lambda model: as_class(model.unembed, LouderUnembed),
    "a subclass of the final norm": lambda model: as_class(model.ln_final, ShiftedNorm),
    "another module for the final norm": replaced_final_norm,
    "a method set on the unembedding": method_on_the_instance,
    "a parametrised gain": lambda model: parametrize.register_parametrization(model.ln_final, "w", Doubled()),
    "a torch hook on the final norm": lambda model: model.ln_final.register_forward_hook(lambda *args: args[2] ** 2),
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_every_reading_goes_through_the_models_own_final_norm_and_unembedding(
    override: Callable[[HookedTransformer], Any],
) -> None:
    model, tokens = tiny_model(output_logits_soft_cap=3.0), tiny_tokens()
    stock = logit_lens(model, tokens, targets=[3])
    override(model)
    sites = [f"blocks.{layer}.hook_{site}" for layer in range(2) for site in SITES]
    logits, cache = model.run_with_cache(tokens, names_filter=sites)
    lens = logit_lens(model, tokens, targets=[3])
    assert lens.labels == tuple(f"{layer}_{site}" for layer in range(2) for site in ("pre", "mid", "post"))
    for index, site in enumerate(sites):
        plain = model.unembed(model.ln_final(cache[site])).log_softmax(-1)
        torch.testing.assert_close(lens.target_log_probs[index, :, :, 0], plain[:, :, 3], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lens.entropy[index], -(plain.exp() * plain).sum(-1), rtol=1e-9, atol=1e-9)
        final = logits.log_softmax(-1)
        divergence = (final.exp() * (final - plain)).sum(-1)
        torch.testing.assert_close(lens.kl[index], divergence, rtol=1e-9, atol=1e-9)
        assert (lens.target_log_probs[index] - stock.target_log_probs[index]).abs().max() > 1e-3


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4), (0,)])
def test_a_stream_with_any_leading_axes_is_read_out(leading: tuple[int, ...]) -> None:
    model = tiny_model()
    stream = torch.randn(*leading, 12, dtype=torch.float64)
    expected = model.unembed(model.ln_final(stream.reshape(1, -1, 12))).reshape(*leading, 20)
    assert read_out(model, stream).shape == (*leading, 20)
    torch.testing.assert_close(read_out(model, stream), expected, rtol=1e-12, atol=1e-12)
