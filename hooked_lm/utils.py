"""Small helpers under their classic names; most are defined in other modules and imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from hooked_lm import tokenization
from hooked_lm._support.classic import (
    filter_dict_by_prefix,
    get_device,
    get_nested_attr,
    is_library_available,
    set_nested_attr,
)
from hooked_lm._support.extras import require_pandas
from hooked_lm._support.precision import at_least_single
from hooked_lm._support.replaced import missing
from hooked_lm.components.activations import gelu_fast, gelu_new, solu
from hooked_lm.factored_matrix import FactoredMatrix, composition_scores
from hooked_lm.generation import sample_logits
from hooked_lm.hooked_model import HookedModel
from hooked_lm.losses import lm_accuracy, lm_cross_entropy_loss
from hooked_lm.names import get_act_name
from hooked_lm.slicing import Slice, SliceInput
from hooked_lm.tokenization import (
    USE_DEFAULT_VALUE,
    LocallyOverridenDefaults,
    Tokenizer,
    keep_single_column,
    tokenize_and_concatenate,
)
from hooked_lm.tokenization import with_bos_string as get_input_with_manually_prepended_bos
from hooked_lm.tokenization import without_bos as get_tokens_with_bos_removed
from hooked_lm.tokenization.linked import TextDefaults, linked
from hooked_lm.weights.initialization import (
    calc_fan_in_and_fan_out,
    init_kaiming_normal_,
    init_kaiming_uniform_,
    init_xavier_normal_,
    init_xavier_uniform_,
)

if TYPE_CHECKING:
    import pandas

__all__ = [
    "USE_DEFAULT_VALUE",
    "ArrayLike",
    "FactoredMatrix",
    "LocallyOverridenDefaults",
    "PromptReport",
    "Slice",
    "SliceInput",
    "calc_fan_in_and_fan_out",
    "composition_scores",
    "filter_dict_by_prefix",
    "gelu_fast",
    "gelu_new",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_device",
    "get_input_with_manually_prepended_bos",
    "get_nested_attr",
    "get_offset_position_ids",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "init_kaiming_normal_",
    "init_kaiming_uniform_",
    "init_xavier_normal_",
    "init_xavier_uniform_",
    "is_library_available",
    "is_lower_triangular",
    "is_square",
    "keep_single_column",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "logits_to_df",
    "override_or_use_default_value",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "set_nested_attr",
    "solu",
    "test_prompt",
    "to_numpy",
    "tokenize_and_concatenate",
    "transpose",
]


# What `to_numpy` takes: a tensor or parameter, an array, nested lists, a number.
ArrayLike = Tensor | np.ndarray | Sequence[object] | float

T = TypeVar("T")


def to_numpy(tensor: ArrayLike) -> np.ndarray:
    """Return a tensor, parameter, list or number as a numpy array on the CPU; bfloat16 becomes float32.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        array: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array
    if isinstance(tensor, (list, tuple, int, float, bool, str, np.generic)):
        return np.array(tensor)
    raise TypeError(f"cannot make a numpy array of {type(tensor).__name__}")


@overload
def get_corner(tensor: Tensor | FactoredMatrix, n: int = 3) -> Tensor: ...
@overload
def get_corner(tensor: np.ndarray, n: int = 3) -> np.ndarray: ...
def get_corner(tensor: Tensor | np.ndarray | FactoredMatrix, n: int = 3) -> Tensor | np.ndarray:
    """Return the first `n` entries along every axis of a tensor or a FactoredMatrix.

    Args:
        tensor: a tensor, an array or a `FactoredMatrix`.
        n: how many entries.
    """
    if isinstance(tensor, FactoredMatrix):
        return get_corner(tensor.get_corner(n), n)
    return tensor[(slice(n),) * tensor.ndim]


def is_square(x: Tensor) -> bool:
    """Whether this is a square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether this is a square matrix with zeros above the diagonal."""
    return is_square(x) and bool(torch.equal(x, x.tril()))


def transpose(tensor: Tensor) -> Tensor:
    """Return the tensor with its last two axes exchanged."""
    return tensor.transpose(-1, -2)


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """Return the tensor without its first axis if that has length 1, and as it is otherwise."""
    return tensor.squeeze(0)


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """Return [batch pos d_model] as [batch pos head d_model]: a copy for each head, or one view for all of them.

    Args:
        tensor: [batch pos d_model].
        n_heads: how many.
        clone_tensor: a copy for each head, rather than one view.
    """
    repeated = tensor[:, :, None].expand(-1, -1, n_heads, -1)
    return repeated.clone() if clone_tensor else repeated


def override_or_use_default_value(default_flag: T, override: T | None = None) -> T:
    """Return the override, or the default where that is None.

    Args:
        default_flag: the default.
        override: the value that takes precedence, or None.
    """
    return default_flag if override is None else override


def get_attention_mask(
    tokenizer: Tokenizer, tokens: Tensor, prepend_bos: bool, padding_side: str | None = None
) -> Tensor:
    """Return the mask [batch pos] of padded tokens, 0 at padding; of ones without a tokenizer.

    Args:
        tokenizer: its padding token decides; None for none.
        tokens: [batch pos].
        prepend_bos: whether prompts start with BOS.
        padding_side: by default the tokenizer's.

    Raises:
        ValueError: a side that is neither `"left"` nor `"right"`.
    """
    if tokenizer is None:
        return torch.ones_like(tokens)
    side = tokenizer.padding_side if padding_side is None else padding_side
    tokenization.check_padding_side(side)
    inferred = tokenization.infer_attention_mask(tokenizer, tokens, prepend_bos, side)
    return torch.ones_like(tokens) if inferred is None else inferred


def get_cumsum_along_dim(tensor: Tensor, dim: int, reverse: bool = False) -> Tensor:
    """Return the cumulative sum along an axis, from its end if `reverse`.

    Args:
        tensor: any tensor.
        dim: the axis.
        reverse: sum each entry with all entries after it.
    """
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: Tensor) -> Tensor:
    """Return each token's position in its own prompt, padding not counted, from a mask over past and new tokens.

    Args:
        past_kv_pos_offset: how many positions are in the past.
        attention_mask: [batch pos], 0 at padding.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return positions[:, past_kv_pos_offset:]


def get_tokenizer_with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that puts BOS in front of a text, with a padding token.

    Args:
        tokenizer: of the transformers library.

    Raises:
        ValueError: it has no BOS token.
    """
    made = tokenization.with_bos(tokenizer)
    return linked(made, TextDefaults(True, made.padding_side))


@dataclass(frozen=True)
class AnswerToken:
    """How a model ranked one token of an answer.

    Attributes:
        token: the token as a string.
        rank: the token's rank, 0 for the likeliest.
        logit, probability: the token's.
        top: the likeliest tokens at this position, as (string, logit, probability).
    """

    token: str
    rank: int
    logit: float
    probability: float
    top: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class PromptReport:
    """How a model answered a prompt. As a string, the report that `test_prompt` prints.

    Attributes:
        prompt_tokens: as strings.
        answers: the tokens of each answer.
    """

    prompt_tokens: list[str]
    answers: tuple[tuple[AnswerToken, ...], ...]

    @property
    def ranks(self) -> list[list[int]]:
        """The rank of each token of each answer."""
        return [[token.rank for token in answer] for answer in self.answers]

    def __str__(self) -> str:
        lines = [f"Tokenized prompt: {self.prompt_tokens}"]
        for answer in self.answers:
            lines.append(f"Tokenized answer: {[token.token for token in answer]}")
            for token in answer:
                lines.append(
                    f"{token.token!r}: rank {token.rank}, logit {token.logit:.2f}, probability {token.probability:.2%}"
                )
                for place, (string, logit, probability) in enumerate(token.top):
                    lines.append(f"  top {place}: logit {logit:6.2f}  probability {probability:7.2%}  {string!r}")
        return "\n".join(lines)


@torch.no_grad()
def test_prompt(
    prompt: str,
    answer: str | Sequence[str],
    model: HookedModel,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> PromptReport:
    """Ask whether a model gives the right answer; print the report and return it.

    Each token of the answer is ranked with the tokens before it in place.

    Args:
        prompt: the text so far.
        answer: the right continuation, or several to compare.
        model: a `HookedTransformer` with a tokenizer.
        prepend_space_to_answer: put a space in front of an answer that has none.
        print_details: print the report.
        prepend_bos: by default the model's.
        top_k: how many of the likeliest tokens to list.

    Raises:
        ValueError: an answer is empty.
    """
    answers = [answer] if isinstance(answer, str) else list(answer)
    prompt_tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    ranked = []
    for one in answers:
        text = f" {one}" if prepend_space_to_answer and not one.startswith(" ") else one
        tokens = model.to_tokens(text, prepend_bos=False)
        both = torch.cat((prompt_tokens, tokens), 1)
        logits = model(both, attention_mask=torch.ones_like(both))[0, prompt_tokens.shape[1] - 1 : -1]
        ranked.append(tuple(_rank_token(model, *pair, top_k) for pair in zip(logits, tokens[0].tolist(), strict=True)))
    report = PromptReport(cast("list[str]", model.to_str_tokens(prompt_tokens[0])), tuple(ranked))
    if print_details:
        print(report)
    return report


# Without this pytest would collect the function as a test wherever it is imported.
test_prompt.__test__ = False  # type: ignore[attr-defined]


def _rank_token(model: HookedModel, logits: Tensor, token: int, top_k: int) -> AnswerToken:
    probabilities = logits.softmax(-1)
    best = logits.topk(min(top_k, logits.shape[-1]))
    top = tuple(
        (model.to_single_str_token(int(index)), float(value), float(probabilities[index]))
        for value, index in zip(best.values, best.indices, strict=True)
    )
    return AnswerToken(
        token=model.to_single_str_token(token),
        rank=int((logits > logits[token]).sum()),
        logit=float(logits[token]),
        probability=float(probabilities[token]),
        top=top,
    )


def logits_to_df(logits: Tensor, tokenizer: Tokenizer | None = None, top_k: int | None = None) -> pandas.DataFrame:
    """Return the tokens of one position's logits as a pandas DataFrame, the likeliest first.

    Its columns are `token_index`, `token_string` if there is a tokenizer, `logit`, `log_prob` and `probability`.

    Args:
        logits: [vocab].
        tokenizer: gives the strings.
        top_k: how many tokens; all of them by default, or if there are fewer.

    Raises:
        ImportError: pandas is not installed; the `notebooks` extra brings it.
        ValueError: the logits are of more than one position.
    """
    pd = require_pandas("logits_to_df")
    if logits.ndim != 1:
        raise ValueError(f"logits of one position [vocab] are expected, got shape {tuple(logits.shape)}")
    logits = logits.detach()
    log_probabilities = at_least_single(logits).log_softmax(-1)
    order = logits.argsort(descending=True)[:top_k]
    columns: dict[str, object] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenization.str_tokens(tokenizer, [index])[0] for index in order.tolist()]
    columns["logit"] = to_numpy(logits[order])
    columns["log_prob"] = to_numpy(log_probabilities[order])
    columns["probability"] = to_numpy(log_probabilities[order].exp())
    frame: pandas.DataFrame = pd.DataFrame(columns)
    return frame


_REPLACED = {
    "check_structure": "compare the signs of differences yourself (tensor.diff().sign())",
    "clear_huggingface_cache": "delete the folder of huggingface_hub.constants.HF_HUB_CACHE",
    "download_file_from_hf": "use huggingface_hub.hf_hub_download",
    "get_dataset": "load the texts with datasets.load_dataset, and give them to tokenize_and_concatenate",
    "get_matrix_corner": "use get_corner, which takes a FactoredMatrix too",
    "move_to_and_update_config": "use model.to, which keeps model.cfg up to date",
    "print_gpu_mem": "use torch.cuda.memory_allocated",
    "warn_if_mps": "a device is used as it is named",
    "get_device_for_block_index": "model.spread_over has the devices of a model that was spread",
    "get_best_available_device": "a model is on one device, model.cfg.device",
}


def __getattr__(name: str) -> object:
    raise missing("module 'hooked_lm.utils'", name, _REPLACED)
