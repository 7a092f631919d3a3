"""Metrics: scores of a run's logits that declare which positions and tokens they read.

A metric is called with logits [batch pos vocab] and returns their mean score, a scalar; any function that does so
can be used as a metric. A `Metric` also declares the position and tokens it reads: a sweep unembeds nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm._support.integers import integer, is_integer
from hooked_lm._support.precision import at_least_single

__all__ = [
    "Metric",
    "Tokens",
    "accuracy",
    "get_metric",
    "kl_to",
    "log_prob",
    "logit",
    "logit_diff",
    "metric_names",
    "one_number",
    "preferred",
    "prob",
    "rank",
    "register_metric",
]

Tokens = int | Tensor | list[int]


@dataclass(frozen=True, eq=False)
class Metric:
    """A score of each prompt's logits at one position.

    Attributes:
        name: for messages and axis titles.
        pos: the position whose logits are read; negative counts from the end.
        tokens: the vocabulary entries that are read, [batch_or_1 token]; None for all of them.
        score: logits of those entries [... batch token], in float32 or float64 -> [... batch].
        answers: the tokens that have to be in the vocabulary, [batch_or_1 token]; by default those that are read.
        n_prompts: the number of prompts that the metric fits; 1 for any number.
        d_vocab: the size of the vocabulary that the metric fits; None for any size.
        maker: the name under which `get_metric` has the function that made it; None for a metric made in another way.
        arguments: the arguments that its maker was called with. With the name they make the metric anew, elsewhere.
    """

    name: str
    pos: int
    tokens: Tensor | None
    score: Callable[[Tensor], Tensor]
    answers: Tensor | None = None
    n_prompts: int = 1
    d_vocab: int | None = None
    maker: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_integer(self.pos):
            raise ValueError(f"{self.name} reads one position, an int; got {self.pos!r}")
        object.__setattr__(self, "pos", integer(self.pos, "pos"))

    def per_prompt(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """Return each prompt's score.

        Raises:
            ValueError: the logits are not [batch pos vocab], lack the position, or are of another number of prompts
                than the answers.
        """
        if logits.ndim != 3:
            raise ValueError(f"{self.name} reads logits [batch pos vocab], got shape {tuple(logits.shape)}")
        self.check(logits.shape[0], logits.shape[1], logits.shape[2])
        read = logits[:, self.pos]
        if self.tokens is not None:
            tokens = self.tokens.to(logits.device)
            read = read.gather(-1, tokens.expand(logits.shape[0], -1))
        return self.scores(read)

    def scores(self, read: Float[Tensor, "*leading batch token"]) -> Float[Tensor, "*leading batch"]:
        """Return the scores, given the logits that the metric reads; half precision is converted to float32 first."""
        return self.score(at_least_single(read))

    def check(self, batch: int, n_positions: int, d_vocab: int) -> None:
        """Check the metric against logits of this shape, which need not be there yet.

        Args:
            batch: how many prompts.
            n_positions: how many positions they have.
            d_vocab: how many tokens there are logits for.

        Raises:
            ValueError: it reads a position or a token that they lack, or is made for another number of prompts.
        """
        if not -n_positions <= self.pos < n_positions:
            raise ValueError(f"{self.name} reads position {self.pos}, and the logits have {n_positions} positions")
        if self.d_vocab not in (None, d_vocab):
            raise ValueError(f"{self.name} is made for logits of {self.d_vocab} tokens; these are of {d_vocab}")
        answers = self.tokens if self.answers is None else self.answers
        if answers is not None and not 0 <= int(answers.min()) <= int(answers.max()) < d_vocab:
            raise ValueError(f"{self.name} reads tokens {answers.tolist()}; the vocabulary is 0-{d_vocab - 1}")
        self.check_batch(batch)

    def check_run(
        self, tokens: Int[Tensor, "batch pos"], d_vocab: int, attention_mask: Int[Tensor, "batch pos"] | None
    ) -> None:
        """Check the metric against prompts that will be run, padding included.

        Args:
            tokens: [batch pos].
            d_vocab: how many tokens there are logits for.
            attention_mask: [batch pos], 0 at padding; None if nothing is padded.

        Raises:
            ValueError: as `check`, or it reads padding.
        """
        self.check(tokens.shape[0], tokens.shape[1], d_vocab)
        self.check_mask(attention_mask)

    def check_mask(self, attention_mask: Int[Tensor, "batch pos"] | None) -> None:
        """Check that the position that is read holds no padding.

        Args:
            attention_mask: [batch pos], 0 at padding; None if nothing is padded.

        Raises:
            ValueError: it holds padding, for some prompt.
        """
        padded = [] if attention_mask is None else torch.where(attention_mask[:, self.pos] == 0)[0].tolist()
        if padded:
            raise ValueError(
                f"{self.name} reads position {self.pos}, which is padding in prompt {padded[0]}: pad on the left "
                "(padding_side='left'), or take prompts of one length"
            )

    def check_batch(self, batch: int) -> None:
        """Check that there is an answer for every prompt, or one for all.

        Raises:
            ValueError: the number of answers is neither 1 nor that of the prompts.
        """
        answers = self.tokens if self.answers is None else self.answers
        n_prompts = self.n_prompts if answers is None else answers.shape[0]
        if n_prompts not in (1, batch):
            raise ValueError(f"{self.name} has answers for {n_prompts} prompts; there are {batch}")

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
        return self.per_prompt(logits).mean()


def one_number(metric: Callable[[Tensor], object], logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
    """Return a metric of the logits, checked to be one number; a Python number takes the logits' precision.

    Args:
        metric: a function of the logits.
        logits: [batch pos vocab].

    Raises:
        ValueError: it is something else.
    """
    score = metric(logits)
    if not isinstance(score, Tensor):
        score = torch.as_tensor(score, dtype=logits.dtype, device=logits.device)
    if score.numel() != 1:
        raise ValueError(f"the metric returns a scalar; it returned shape {tuple(score.shape)}")
    return score.reshape(())


def logit(answer: Tokens, pos: int = -1) -> Metric:
    """Return the metric "logit of the answer".

    Args:
        answer: a token, or one for each prompt.
        pos: the position whose logits predict the answer.
    """
    column = _column(answer, "answer")
    made = _made_by("logit", answer=column, pos=pos)
    return Metric("logit", pos, column, lambda read: read[..., 0], **made)


def logit_diff(answer: Tokens, wrong: Tokens, pos: int = -1) -> Metric:
    """Return the metric "logit of the answer minus logit of the wrong one".

    Args:
        answer, pos: as for `logit`.
        wrong: a token, or one for each prompt; its logit is subtracted.

    Raises:
        ValueError: answers and wrong ones for different numbers of prompts.
    """
    tokens, made = _pairs("logit_diff", answer, wrong, pos)
    return Metric("logit difference", pos, tokens, lambda read: read[..., 0] - read[..., 1], **made)


def preferred(answer: Tokens, wrong: Tokens, pos: int = -1) -> Metric:
    """Return the metric "the answer has a larger logit than the wrong one": 1 or 0 per prompt.

    Args:
        answer, wrong, pos: as for `logit_diff`.

    Raises:
        ValueError: answers and wrong ones for different numbers of prompts.
    """
    tokens, made = _pairs("preferred", answer, wrong, pos)
    return Metric("preferred", pos, tokens, lambda read: (read[..., 0] > read[..., 1]).to(read.dtype), **made)


def prob(answer: Tokens, pos: int = -1) -> Metric:
    """Return the metric "probability of the answer".

    Args:
        answer, pos: as for `logit`.
    """
    column = _column(answer, "answer")
    made = _made_by("prob", answer=column, pos=pos)
    return Metric("probability", pos, None, lambda read: _pick(read.log_softmax(-1), column).exp(), column, **made)


def log_prob(answer: Tokens, pos: int = -1) -> Metric:
    """Return the metric "log-probability of the answer", in nats.

    Args:
        answer, pos: as for `logit`.
    """
    column = _column(answer, "answer")
    made = _made_by("log_prob", answer=column, pos=pos)
    return Metric("log-probability", pos, None, lambda read: _pick(read.log_softmax(-1), column), column, **made)


def rank(answer: Tokens, pos: int = -1) -> Metric:
    """Return the metric "rank of the answer": 0 where no token has a larger logit.

    Args:
        answer, pos: as for `logit`.
    """
    column = _column(answer, "answer")

    def score(read: Tensor) -> Tensor:
        return (read > _pick(read, column)[..., None]).sum(-1).to(read.dtype)

    return Metric("rank", pos, None, score, column, **_made_by("rank", answer=column, pos=pos))


def accuracy(answer: Tokens, pos: int = -1) -> Metric:
    """Return the metric "the answer has the largest logit": 1 or 0 per prompt; of equal ones the first token has it.

    Args:
        answer, pos: as for `logit`.
    """
    column = _column(answer, "answer")

    def score(read: Tensor) -> Tensor:
        return (read.argmax(-1) == column.to(read.device)[:, 0]).to(read.dtype)

    return Metric("accuracy", pos, None, score, column, **_made_by("accuracy", answer=column, pos=pos))


def kl_to(reference: Float[Tensor, "batch pos vocab"], pos: int = -1) -> Metric:
    """Return the metric "KL divergence from the reference's next-token distribution to the run's", in nats.

    Args:
        reference: logits, usually the clean run's.
        pos: the position that is compared.

    Raises:
        ValueError: the reference is not [batch pos vocab], or has no such position.
    """
    if reference.ndim != 3:
        raise ValueError(f"kl_to takes logits [batch pos vocab], got shape {tuple(reference.shape)}")
    if not -reference.shape[1] <= pos < reference.shape[1]:
        raise ValueError(f"kl_to compares position {pos}, and the reference has {reference.shape[1]} positions")
    target = at_least_single(reference[:, pos]).log_softmax(-1)

    def score(read: Tensor) -> Tensor:
        wanted = target.to(read)
        terms = wanted.exp() * (wanted - read.log_softmax(-1))
        return terms.masked_fill(wanted == -torch.inf, 0.0).sum(-1)  # a token with probability 0 adds nothing

    made = _made_by("kl_to", reference=reference, pos=pos)
    n_prompts, _, d_vocab = reference.shape
    return Metric("KL divergence", pos, None, score, n_prompts=n_prompts, d_vocab=d_vocab, **made)


class _MadeBy(TypedDict):
    maker: str
    arguments: Mapping[str, object]


def _made_by(maker: str, **arguments: object) -> _MadeBy:
    """The fields of a metric that tell how to make it anew; tokens of the answers as one axis."""
    plain = {name: one[:, 0] if name in ("answer", "wrong") else one for name, one in arguments.items()}  # type: ignore[index]
    return {"maker": maker, "arguments": plain}


def _pairs(maker: str, answer: Tokens, wrong: Tokens, pos: int) -> tuple[Int[Tensor, "batch_or_1 2"], _MadeBy]:
    """Each prompt's answer and wrong token, and the metric's maker with its arguments."""
    right, other = _column(answer, "answer"), _column(wrong, "wrong")
    if len({right.shape[0], other.shape[0]} - {1}) > 1:
        raise ValueError(f"{maker} has {right.shape[0]} answers and {other.shape[0]} wrong ones")
    batch = max(right.shape[0], other.shape[0])
    tokens = torch.cat((right.expand(batch, 1), other.expand(batch, 1)), 1)
    return tokens, _made_by(maker, answer=right, wrong=other, pos=pos)


def _column(tokens: object, what: str) -> Tensor:
    """Tokens as [batch_or_1 1]."""
    if isinstance(tokens, str) or (isinstance(tokens, list) and any(isinstance(one, str) for one in tokens)):
        raise ValueError(f"{what} is a token, or one for each prompt: model.to_single_token turns {tokens!r} into one")
    column = torch.as_tensor(tokens)
    if column.is_floating_point() or column.dtype == torch.bool or column.ndim > 1 or column.numel() == 0:
        raise ValueError(f"{what} is a token, or one for each prompt; got {tokens!r}")
    return column.reshape(-1, 1).long()


def _pick(read: Tensor, column: Tensor) -> Tensor:
    """The entry of each prompt's answer: [... batch vocab] -> [... batch]."""
    column = column.to(read.device).expand(read.shape[-2], 1)
    return read.gather(-1, column.expand(*read.shape[:-1], 1))[..., 0]


# The functions that make metrics, by name. Their arguments differ; all return a Metric.
_MAKERS: dict[str, Callable[..., Metric]] = {
    maker.__name__: maker for maker in (logit, logit_diff, preferred, prob, log_prob, rank, accuracy, kl_to)
}
_BUILT_IN = frozenset(_MAKERS)


def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics, registered ones included."""
    return tuple(_MAKERS)


def register_metric(name: str, maker: Callable[..., Metric], *, replace: bool = False) -> None:
    """Add a metric under a name, for `get_metric`.

    Args:
        name: the name; those of the metrics in this module cannot be taken.
        maker: returns a `Metric`, from arguments of its own: usually the answers, and `pos`.
        replace: take a name that has been registered before.

    Raises:
        ValueError: the name is taken, or is no name.
        TypeError: the maker cannot be called.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a metric's name is a string that is not empty; got {name!r}")
    if not callable(maker):
        raise TypeError(f"a metric's maker is a function that returns a Metric; {maker!r} cannot be called")
    if name in _BUILT_IN and _MAKERS[name] is not maker:
        raise ValueError(f"the metric {name!r} comes with the package: register yours under another name")
    if _MAKERS.get(name, maker) is not maker and not replace:
        raise ValueError(f"the metric {name!r} is registered already: give another name, or replace=True")
    _MAKERS[name] = maker


def get_metric(name: str) -> Callable[..., Metric]:
    """Return the function that makes a metric, such as `logit_diff` for `"logit_diff"`.

    Raises:
        ValueError: no metric has the name; the message lists the names.
    """
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, n=1) if isinstance(name, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no metric {name!r} among {', '.join(_MAKERS)}{hint}")
    return _MAKERS[name]
