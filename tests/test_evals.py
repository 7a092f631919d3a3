"""The classic evaluations: each number against a plain computation, and what they refuse."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hooked_lm import HookedTransformer
from hooked_lm.evals import PARAGRAPH, induction_loss, ioi_eval, sanity_check
from hooked_lm.tokenization import encode
from tests.evals_helpers import MODEL, TINY, WORDS, recorded_tokens, seeded, text_model
from tests.helpers import VOCAB, tiny_model


@torch.no_grad()
def log_probs(model: HookedTransformer, tokens: list[int]) -> Tensor:
    """The log-probability of each token but the first, one prompt at a time."""
    scores = model(torch.tensor([tokens]))[0].log_softmax(-1)
    return torch.stack([scores[pos, token] for pos, token in enumerate(tokens[1:])])


# sanity_check


@pytest.mark.parametrize(("n_ctx", "bos"), [(600, True), (600, False), (40, True)])
def test_the_sanity_check_is_the_mean_loss_on_the_paragraph_as_far_as_it_fits(n_ctx: int, bos: bool) -> None:
    model = text_model(n_ctx=n_ctx, default_prepend_bos=bos)
    tokens = ([WORDS.bos_token_id] if bos else []) + encode(WORDS, PARAGRAPH)
    expected = -log_probs(model, tokens[:n_ctx]).mean()
    loss = sanity_check(model, implausible="ignore")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert loss.ndim == 0
    assert not loss.requires_grad


def model_with_loss(share: float) -> HookedTransformer:
    """A model whose loss on the paragraph is this share of a uniform guess's."""
    model = text_model(n_ctx=40)
    for parameter in model.parameters():
        parameter.data.zero_()
    likely = torch.tensor(sorted(set(encode(WORDS, PARAGRAPH)[:39])))
    with torch.no_grad():  # a uniform guess among these and some others
        total = round(math.exp(share * math.log(model.cfg.d_vocab)))
        others = [token for token in range(model.cfg.d_vocab) if token not in likely]
        model.unembed.b_U.fill_(-1000.0)
        model.unembed.b_U[likely] = 0.0
        model.unembed.b_U[others[: total - len(likely)]] = 0.0
    return model


def test_a_loss_is_implausible_from_two_thirds_of_a_uniform_guess_on() -> None:
    below, above = model_with_loss(0.66), model_with_loss(0.675)
    uniform = math.log(below.cfg.d_vocab)
    assert float(sanity_check(below, implausible="raise")) == pytest.approx(0.66 * uniform, abs=0.01)
    loss = float(sanity_check(above, implausible="ignore"))
    assert loss == pytest.approx(0.675 * uniform, abs=0.01)
    with pytest.raises(ValueError, match=f"is {loss:.3f} nats a token, and a uniform guess .* has {uniform:.3f}"):
        sanity_check(above, implausible="raise")


def test_an_implausible_loss_warns_where_it_was_asked_for_and_is_returned_all_the_same() -> None:
    with pytest.warns(UserWarning, match=r"sanity_check: the loss on plain English is \d+\.\d+ nats") as caught:
        loss = sanity_check(MODEL)
    assert caught[0].filename == __file__
    assert float(loss) > math.log(MODEL.cfg.d_vocab)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sanity_check(MODEL, implausible="ignore"), loss)


def test_a_loss_that_is_no_number_is_implausible() -> None:
    model = text_model()
    model.unembed.b_U.data[3] = math.nan
    with pytest.raises(ValueError, match="is nan nats a token"):
        sanity_check(model, implausible="raise")


def test_the_sanity_check_refuses_an_unknown_option_and_a_model_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="implausible is 'warn', 'raise' or 'ignore', not 'print'"):
        sanity_check(MODEL, implausible="print")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        sanity_check(tiny_model())


def test_half_precision_is_judged_in_single() -> None:
    model = text_model().to(torch.bfloat16)
    assert sanity_check(model, implausible="ignore").dtype == torch.float32
    assert induction_loss(model, subseq_len=5).dtype == torch.float32


# induction_loss


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [2, 9])
def test_the_induction_loss_is_the_mean_over_the_repeat_but_its_first_token(bos: bool, length: int) -> None:
    with recorded_tokens(MODEL) as seen:
        loss = induction_loss(MODEL, batch_size=3, subseq_len=length, prepend_bos=bos)
    (tokens,) = seen
    assert tokens.shape == (3, 2 * length + bos)
    if bos:
        assert (tokens[:, 0] == WORDS.bos_token_id).all()
    first, second = tokens[:, bos : bos + length], tokens[:, bos + length :]
    assert torch.equal(first, second)
    expected = -torch.stack([log_probs(MODEL, row.tolist())[bos + length :] for row in tokens]).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert loss.ndim == 0


def test_the_loss_is_low_for_the_demo_model_and_high_without_its_induction_heads() -> None:
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    whole = float(induction_loss(model, batch_size=16, subseq_len=12))
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        without = float(induction_loss(model, batch_size=16, subseq_len=12))
    assert whole < 1  # without the start token it was trained with
    assert without > 3


@pytest.mark.parametrize("tokenizer", [TINY, None], ids=["tokenizer", "no tokenizer"])
def test_the_tokens_drawn_are_all_different_and_any_but_special_ones(tokenizer: Any) -> None:
    model = tiny_model(n_ctx=2 * VOCAB, d_vocab=VOCAB + 50)
    length = VOCAB - 1 if tokenizer else 250
    with recorded_tokens(model) as seen:
        induction_loss(model, tokenizer, batch_size=2, subseq_len=length, prepend_bos=False)
    for row in seen[0].tolist():
        assert len(set(row)) == length
        if tokenizer:
            assert set(row) == set(range(1, VOCAB))  # 0 is <|endoftext|>, and from VOCAB on it knows none
        else:
            assert max(row) >= VOCAB
    if tokenizer:
        with pytest.raises(ValueError, match=f"repeats 2 to {VOCAB - 1} different tokens"):
            induction_loss(model, tokenizer, subseq_len=VOCAB, prepend_bos=False)


def test_bos_is_in_front_as_the_model_has_it_and_never_without_a_tokenizer() -> None:
    for model, width in (
        (text_model(), 9),
        (text_model(default_prepend_bos=False), 8),
        (tiny_model(default_prepend_bos=True), 8),
    ):
        with recorded_tokens(model) as seen:
            induction_loss(model, subseq_len=4)
        assert seen[0].shape == (4, width)
    with pytest.raises(ValueError, match="prepend_bos=True takes a tokenizer"):
        induction_loss(tiny_model(), subseq_len=4, prepend_bos=True)


def test_an_end_of_sequence_token_does_not_stand_in_for_bos() -> None:
    without = PreTrainedTokenizerFast(tokenizer_object=TINY.backend_tokenizer, eos_token="!", unk_token=None)
    model = tiny_model(d_vocab=VOCAB)
    with pytest.raises(ValueError, match="prepend_bos=True needs a BOS token, and this tokenizer has none"):
        induction_loss(model, without, subseq_len=4, prepend_bos=True)
    with recorded_tokens(model) as seen:
        induction_loss(model, without, subseq_len=4, prepend_bos=False)
    assert seen[0].shape == (4, 8)


def test_a_drawn_padding_token_is_read_as_any_other() -> None:
    model = text_model(TINY, default_padding_side="left")
    with recorded_tokens(model) as seen:
        expected = induction_loss(model, TINY, subseq_len=9, prepend_bos=False)
    # From now on the first token drawn looks like padding in front.
    own: Any = model.tokenizer
    own.pad_token = TINY.convert_ids_to_tokens(int(seen[0][0, 0]))
    assert not torch.equal(model(seen[0][:1]), model(seen[0][:1], attention_mask=torch.ones_like(seen[0][:1])))
    assert torch.equal(induction_loss(model, TINY, subseq_len=9, prepend_bos=False), expected)


@pytest.mark.parametrize(("n_ctx", "bos", "longest"), [(16, True, 7), (17, True, 8), (17, False, 8), (16, False, 8)])
def test_a_block_that_does_not_fit_twice_raises_and_says_what_does(n_ctx: int, bos: bool, longest: int) -> None:
    model = text_model(n_ctx=n_ctx)
    assert induction_loss(model, subseq_len=longest, prepend_bos=bos).isfinite()
    for length in (longest + 1, 384):
        with pytest.raises(ValueError, match=rf"n_ctx of {n_ctx}: subseq_len={longest} is the most it takes"):
            induction_loss(model, subseq_len=length, prepend_bos=bos)


@pytest.mark.parametrize("options", [{"subseq_len": 1}, {"batch_size": 0}], ids=str)
def test_too_little_to_repeat_raises(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in at least one row; got"):
        induction_loss(MODEL, **{"subseq_len": 4, **options})


def test_a_tokenizer_of_another_model_raises() -> None:
    with pytest.raises(ValueError, match=f"go up to {len(WORDS) - 1}, the model's only to 19"):
        induction_loss(tiny_model(), WORDS, subseq_len=4)


def test_the_device_has_to_be_the_models() -> None:
    expected = induction_loss(MODEL, subseq_len=4)
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert torch.equal(induction_loss(MODEL, subseq_len=4, device=device), expected)
    for device in ("meta", "cuda", "cpu:1"):
        with pytest.raises(ValueError, match=f"runs where the model is, on cpu, not on {device}"):
            induction_loss(MODEL, subseq_len=4, device=device)
    assert MODEL.W_E.device.type == "cpu"


# All of them


EVALS = {
    "sanity_check": lambda model, **how: sanity_check(model, implausible="ignore"),
    "induction_loss": lambda model, **how: induction_loss(model, subseq_len=6, **how),
    "ioi_eval": lambda model, **how: ioi_eval(model, num_samples=6, **how),
}


@pytest.mark.parametrize("evaluate", EVALS.values(), ids=EVALS)
def test_the_model_the_grad_mode_and_the_global_generator_stay_as_they_were(evaluate: Any) -> None:
    model = text_model().train()
    calls: list[str] = []
    model.add_hook("hook_embed", lambda x, hook: calls.append(hook.name))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cfg, state = model.cfg.to_dict(), torch.get_rng_state()
    evaluate(model)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.cfg.to_dict() == cfg
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert calls  # a hook that stood took part,
    assert model.hook_dict["hook_embed"].has_hooks()  # and still stands
    assert model(torch.tensor([[1, 2]])).requires_grad


@pytest.mark.parametrize("name", ["induction_loss", "ioi_eval"])
def test_a_generator_decides_what_is_drawn(name: str) -> None:
    evaluate = EVALS[name]
    default, one, again, other = (
        evaluate(MODEL, **how) for how in ({}, *({"generator": seeded(s)} for s in (1, 1, 2)))
    )
    assert evaluate(MODEL) == default
    assert one == again
    assert one not in (other, default)
