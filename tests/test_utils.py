"""The small helpers under their classic names."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from hooked_lm import FactoredMatrix, HookedTransformer, generation, losses, names, slicing, tokenization, utils
from tests.helpers import VOCAB, randomise_, tiny_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS = 0
CLASSIC = [
    "get_act_name",
    "Slice",
    "to_numpy",
    "get_corner",
    "composition_scores",
    "test_prompt",
    "logits_to_df",
    "sample_logits",
    "lm_cross_entropy_loss",
    "lm_accuracy",
    "gelu_new",
    "gelu_fast",
    "solu",
    "get_attention_mask",
    "get_cumsum_along_dim",
    "get_offset_position_ids",
    "is_square",
    "is_lower_triangular",
    "transpose",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "tokenize_and_concatenate",
    "get_tokenizer_with_bos",
    "override_or_use_default_value",
    "calc_fan_in_and_fan_out",
    "init_xavier_uniform_",
    "init_xavier_normal_",
    "init_kaiming_uniform_",
    "init_kaiming_normal_",
]


def text_model(**changes: Any) -> HookedTransformer:
    """A tiny model that reads text."""
    fields = {"d_vocab": VOCAB, "n_ctx": 64, **changes}
    return randomise_(HookedTransformer(tiny_config(**fields), TOKENIZER))  # type: ignore[return-value]


@pytest.mark.parametrize("name", CLASSIC)
def test_every_classic_name_is_there(name: str) -> None:
    assert callable(getattr(utils, name))
    assert name in utils.__all__


def test_names_that_live_elsewhere_are_the_same_objects() -> None:
    assert utils.get_act_name is names.get_act_name
    assert utils.Slice is slicing.Slice
    assert utils.sample_logits is generation.sample_logits
    assert utils.lm_cross_entropy_loss is losses.lm_cross_entropy_loss
    assert utils.lm_accuracy is losses.lm_accuracy
    assert utils.tokenize_and_concatenate is tokenization.tokenize_and_concatenate


# Arrays


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.nn.Parameter(torch.arange(3.0)),
        torch.arange(3.0, requires_grad=True) * 2,
        torch.tensor([True, False]),
        torch.tensor(3),
        np.arange(4),
        np.float32(2.5),
        [1, 2, 3],
        (1.5, 2.5),
        [[1, 2], [3, 4]],
        3,
        2.5,
        True,
    ],
)
def test_to_numpy_keeps_the_values(value: Any) -> None:
    array = utils.to_numpy(value)
    assert isinstance(array, np.ndarray)
    expected = value.tolist() if hasattr(value, "tolist") else value
    assert array.tolist() == (list(expected) if isinstance(expected, tuple) else expected)


def test_to_numpy_keeps_precision_where_numpy_has_it() -> None:
    for dtype, expected in (
        (torch.float64, np.float64),
        (torch.float32, np.float32),
        (torch.float16, np.float16),
        (torch.bfloat16, np.float32),
        (torch.int64, np.int64),
        (torch.bool, np.bool_),
    ):
        assert utils.to_numpy(torch.ones(2).to(dtype)).dtype == expected


def test_to_numpy_of_something_else_raises() -> None:
    with pytest.raises(TypeError, match="cannot make a numpy array of dict"):
        utils.to_numpy({"a": 1})


def test_get_corner_takes_the_first_entries_along_every_axis() -> None:
    tensor = torch.arange(5 * 6 * 7).reshape(5, 6, 7)
    assert torch.equal(utils.get_corner(tensor), tensor[:3, :3, :3])
    assert torch.equal(utils.get_corner(tensor, 2), tensor[:2, :2, :2])
    assert torch.equal(utils.get_corner(torch.arange(2)), torch.arange(2))
    assert np.array_equal(utils.get_corner(tensor.numpy(), 2), tensor[:2, :2, :2].numpy())


def test_get_corner_of_a_factored_matrix_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
    B = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(utils.get_corner(FactoredMatrix(A, B)), (A @ B)[:3, :3, :3])


def test_composition_scores_are_norms_of_products_over_products_of_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, C, D = (torch.randn(5, 5, generator=generator, dtype=torch.float64)[:, :k] for k in (2, 5, 3, 5))
    left, right = FactoredMatrix(A, B[:2]), FactoredMatrix(C, D[:3])
    product, sizes = A @ B[:2] @ C @ D[:3], (A @ B[:2]).norm() * (C @ D[:3]).norm()
    torch.testing.assert_close(utils.composition_scores(left, right), product.norm() / sizes)


def test_square_matrices_and_lower_triangular_ones_are_told_from_others() -> None:
    assert utils.is_square(torch.ones(3, 3))
    for other in (torch.ones(3, 4), torch.ones(3), torch.ones(3, 3, 3)):
        assert not utils.is_square(other)
    lower = torch.ones(3, 3).tril()
    assert utils.is_lower_triangular(lower)
    assert utils.is_lower_triangular(lower.bool())
    assert not utils.is_lower_triangular(lower.T)
    assert not utils.is_lower_triangular(torch.ones(4, 3).tril())


def test_transpose_exchanges_the_last_two_axes() -> None:
    tensor = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(utils.transpose(tensor), tensor.permute(0, 2, 1))


def test_remove_batch_dim_removes_a_batch_of_one_only() -> None:
    assert utils.remove_batch_dim(torch.ones(1, 2, 1)).shape == (2, 1)
    assert utils.remove_batch_dim(torch.ones(2, 1)).shape == (2, 1)


@pytest.mark.parametrize("clone", [True, False])
def test_repeating_along_the_head_axis_gives_each_head_the_same(clone: bool) -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    repeated = utils.repeat_along_head_dimension(tensor, 5, clone_tensor=clone)
    assert repeated.shape == (2, 3, 5, 4)
    assert all(torch.equal(repeated[:, :, head], tensor) for head in range(5))
    assert (repeated.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()) != clone


def test_an_override_wins_unless_it_is_none() -> None:
    assert utils.override_or_use_default_value(True, None) is True
    assert utils.override_or_use_default_value(True, False) is False
    assert utils.override_or_use_default_value("right") == "right"
    assert utils.override_or_use_default_value(3, 0) == 0


def test_cumulative_sums_go_either_way() -> None:
    tensor = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert utils.get_cumsum_along_dim(tensor, 1).tolist() == [[1, 3, 6], [4, 9, 15]]
    assert utils.get_cumsum_along_dim(tensor, 1, reverse=True).tolist() == [[6, 5, 3], [15, 11, 6]]
    assert utils.get_cumsum_along_dim(tensor, 0).tolist() == [[1, 2, 3], [5, 7, 9]]
    assert utils.get_cumsum_along_dim(tensor, -1, reverse=True).tolist() == [[6, 5, 3], [15, 11, 6]]


def test_offset_position_ids_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert utils.get_offset_position_ids(0, mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert utils.get_offset_position_ids(3, mask).tolist() == [[1, 2], [3, 4], [2, 2]]


# Tokenizers


@pytest.mark.parametrize(
    ("side", "prepend_bos", "tokens", "mask"),
    [
        ("left", True, [[0, 0, 0, 5], [0, 7, 8, 9]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ("left", False, [[0, 0, 5, 0], [6, 7, 8, 9]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ("right", True, [[0, 5, 0, 0], [0, 0, 0, 0]], [[1, 1, 0, 0], [1, 0, 0, 0]]),
        ("right", False, [[5, 0, 6, 0], [6, 7, 8, 9]], [[1, 1, 1, 0], [1, 1, 1, 1]]),
        ("right", True, [[0, 5, 6, 7]], [[1, 1, 1, 1]]),
    ],
)
def test_the_mask_of_padded_tokens(side: str, prepend_bos: bool, tokens: list, mask: list) -> None:
    tokenizer = utils.get_tokenizer_with_bos(TOKENIZER)
    tokenizer.padding_side = side
    assert utils.get_attention_mask(tokenizer, torch.tensor(tokens), prepend_bos).tolist() == mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_with_a_padding_token_of_its_own(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side, pad = side, tokenizer.pad_token_id
    tokens = torch.tensor([[pad, pad, BOS, 5], [BOS, 7, pad, pad]])
    expected = [[0, 0, 1, 1], [1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert utils.get_attention_mask(tokenizer, tokens, True).tolist() == expected


def test_get_tokenizer_with_bos_copies_and_makes_up_no_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    copied = utils.get_tokenizer_with_bos(tokenizer)
    assert copied is not tokenizer
    assert (copied.bos_token, copied.pad_token, copied.padding_side) == ("<|endoftext|>", "<|endoftext|>", "left")
    assert tokenizer.pad_token is None
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="get_tokenizer_with_bos needs a BOS token, and this tokenizer has none"):
        utils.get_tokenizer_with_bos(tokenizer)


# Activation functions


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (utils.gelu_new, lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        (utils.gelu_fast, lambda x: 0.5 * x * (1 + math.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))),
    ],
)
def test_gelus_are_their_formulas(function: Callable[[Tensor], Tensor], formula: Callable[[float], float]) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([formula(float(value)) for value in x], dtype=torch.float64)
    torch.testing.assert_close(function(x), expected, atol=1e-12, rtol=0)


def test_solu_is_x_times_its_softmax() -> None:
    x = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    total = x.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(utils.solu(x), x * x.exp() / total, atol=1e-12, rtol=0)


# Initialisation


def test_fans_count_inputs_and_outputs() -> None:
    assert utils.calc_fan_in_and_fan_out(torch.empty(7)) == (1, 7)
    assert utils.calc_fan_in_and_fan_out(torch.empty(5, 7)) == (5, 7)
    assert utils.calc_fan_in_and_fan_out(torch.empty(3, 5, 7)) == (5, 21)
    with pytest.raises(ValueError, match="no fan-in for a tensor with shape"):
        utils.calc_fan_in_and_fan_out(torch.empty(2, 3, 5, 7))


@pytest.mark.parametrize("shape", [(100, 300), (4, 100, 75)])
@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize(
    ("init", "options", "variance"),
    [
        (utils.init_xavier_uniform_, {}, 2 / 400),
        (utils.init_xavier_normal_, {}, 2 / 400),
        (utils.init_kaiming_uniform_, {}, 2 / 100),
        (utils.init_kaiming_normal_, {}, 2 / 100),
        (utils.init_kaiming_uniform_, {"mode": "fan_out"}, 2 / 300),
        (utils.init_kaiming_normal_, {"nonlinearity": "linear"}, 1 / 100),
        (utils.init_kaiming_normal_, {"nonlinearity": "leaky_relu", "a": 2.0}, 2 / 5 / 100),
    ],
)
def test_initialisation_has_the_variance_it_promises(
    shape: tuple[int, ...], gain: float, init: Callable[..., Tensor], options: dict[str, Any], variance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    result = init(parameter, gain=gain, generator=generator, **options)
    assert result is parameter
    assert parameter.requires_grad
    values = parameter.detach()
    # 30,000 draws: the sample variance is within 4% at five standard errors.
    assert values.var().item() == pytest.approx(gain**2 * variance, rel=0.045)
    assert abs(values.mean().item()) < 5 * gain * math.sqrt(variance / 30_000)
    bound = math.sqrt(3 * variance) * gain
    if "uniform" in init.__name__:
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.99 * bound
    else:
        assert values.abs().max() > 1.5 * bound


def test_kaiming_of_an_unknown_fan_raises() -> None:
    with pytest.raises(ValueError, match="mode is 'fan_in' or 'fan_out', not 'fan'"):
        utils.init_kaiming_normal_(torch.empty(2, 2), mode="fan")


# test_prompt

PROMPT = "When John and Mary went to the"


@torch.no_grad()
@pytest.mark.parametrize("bos", [True, False])
def test_test_prompt_ranks_each_token_of_the_answer(bos: bool) -> None:
    model = text_model(default_prepend_bos=bos)
    report = utils.test_prompt(PROMPT, "store Mary", model, print_details=False)
    prompt = model.to_tokens(PROMPT)
    answer = model.to_tokens(" store Mary", prepend_bos=False)[0]
    assert len(answer) > 1
    assert report.prompt_tokens == model.to_str_tokens(prompt[0])
    assert [token.token for token in report.answers[0]] == model.to_str_tokens(answer)
    so_far = prompt
    for judged, token in zip(report.answers[0], answer, strict=True):
        logits = model(so_far)[0, -1]
        probabilities = logits.softmax(-1)
        order = logits.argsort(descending=True).tolist()
        assert judged.rank == order.index(int(token))
        assert judged.logit == pytest.approx(float(logits[token]), abs=1e-10)
        assert judged.probability == pytest.approx(float(probabilities[token]), abs=1e-10)
        assert len(judged.top) == 10
        for place, (string, logit, probability) in enumerate(judged.top):
            assert string == model.to_single_str_token(order[place])
            assert logit == pytest.approx(float(logits[order[place]]), abs=1e-10)
            assert probability == pytest.approx(float(probabilities[order[place]]), abs=1e-10)
        so_far = torch.cat((so_far, token[None, None]), 1)
    assert report.ranks == [[token.rank for token in report.answers[0]]]


def test_test_prompt_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    report = utils.test_prompt(PROMPT, " Mary", text_model())
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    judged = report.answers[0][0]
    assert f"' Mary': rank {judged.rank}, logit {judged.logit:.2f}, probability {judged.probability:.2%}" in printed
    assert repr(judged.top[0][0]) in printed
    assert str(report.prompt_tokens) in printed


def test_test_prompt_prints_nothing_when_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    utils.test_prompt(PROMPT, " Mary", text_model(), print_details=False)
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_test_prompt_compares_several_answers() -> None:
    model = text_model()
    report = utils.test_prompt(PROMPT, [" Mary", " John"], model, print_details=False, top_k=3)
    logits = model(PROMPT)[0, -1]
    for answer, text in zip(report.answers, (" Mary", " John"), strict=True):
        assert [token.token for token in answer] == [text]
        assert answer[0].logit == pytest.approx(float(logits[model.to_single_token(text)]), abs=1e-10)
        assert len(answer[0].top) == 3


def test_test_prompt_puts_a_space_in_front_of_an_answer_that_has_none() -> None:
    model = text_model()
    with_space = utils.test_prompt(PROMPT, " Mary", model, print_details=False)
    assert utils.test_prompt(PROMPT, "Mary", model, print_details=False) == with_space
    bare = utils.test_prompt(PROMPT, "Mary", model, prepend_space_to_answer=False, print_details=False)
    assert "".join(token.token for token in bare.answers[0]) == "Mary"


@torch.no_grad()
@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_test_prompt_reads_the_prompt_as_the_model_does(default: bool, bos: bool, side: str) -> None:
    model = text_model(default_prepend_bos=default, default_padding_side=side)
    report = utils.test_prompt(PROMPT, " Mary", model, prepend_bos=bos, print_details=False)
    assert (report.prompt_tokens[0] == "<|endoftext|>") == bos
    expected = model(PROMPT, prepend_bos=bos)[0, -1, model.to_single_token(" Mary")]
    assert report.answers[0][0].logit == pytest.approx(float(expected), abs=1e-10)


def test_test_prompt_of_an_empty_answer_raises() -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        utils.test_prompt(PROMPT, "", text_model(), prepend_space_to_answer=False)


def test_test_prompt_keeps_no_graph_and_no_hooks() -> None:
    model, grads = text_model(), []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: grads.append(x.requires_grad))]):
        utils.test_prompt(PROMPT, " Mary", model, print_details=False)
    assert grads == [False]


# logits_to_df


def test_logits_become_a_table_with_the_likeliest_first() -> None:
    model = text_model()
    logits = model(PROMPT)[0, -1]
    table = utils.logits_to_df(logits, model.tokenizer, top_k=7)
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == ["token_index", "token_string", "logit", "log_prob", "probability"]
    order = logits.argsort(descending=True)[:7]
    assert table["token_index"].tolist() == order.tolist()
    assert table["token_string"].tolist() == [model.to_single_str_token(int(token)) for token in order]
    for column, values in (
        ("logit", logits),
        ("log_prob", logits.log_softmax(-1)),
        ("probability", logits.softmax(-1)),
    ):
        np.testing.assert_allclose(table[column].to_numpy(), values[order].detach().numpy(), atol=1e-12)


def test_a_table_has_a_row_for_each_token_unless_told_otherwise_and_strings_only_from_a_tokenizer() -> None:
    logits = text_model()(PROMPT)[0, -1]
    table = utils.logits_to_df(logits)
    assert len(table) == len(logits)
    assert "token_string" not in table
    assert len(utils.logits_to_df(logits[:5], top_k=20)) == 5
    half = utils.logits_to_df(logits.half())
    np.testing.assert_allclose(
        half["log_prob"].to_numpy(), logits.half().float().log_softmax(-1).sort(descending=True)[0].detach()
    )


def test_a_table_is_of_one_position() -> None:
    model = text_model()
    with pytest.raises(ValueError, match=r"logits of one position \[vocab\]"):
        utils.logits_to_df(model(PROMPT)[0], model.tokenizer)


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"logits_to_df needs pandas: pip install 'hooked-lm\[notebooks\]'"):
        utils.logits_to_df(torch.zeros(VOCAB), model.tokenizer)


def test_importing_the_helpers_imports_no_pandas() -> None:
    code = "import sys, hooked_lm.utils; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
