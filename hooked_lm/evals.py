"""The classic quick evaluations: loss on a paragraph, loss on a repeat, and indirect object identification.

sanity_check(model)                               # nats a token on a paragraph of English
induction_loss(model, subseq_len=100)             # near 0 where induction heads do their work
ioi_eval(model, num_samples=200)                  # {"Logit Difference": ..., "Accuracy": ...}
ioi_eval(model, IOIDataset(model.tokenizer, names=["Alice", "Bob"]))

They run the model as it is, with its hooks, and do not change it. The classic evaluations on downloaded text (the
`make_*_data_loader` functions and `evaluate`) are left out, and say so: no function here downloads data.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single
from hooked_lm._support.replaced import missing
from hooked_lm.circuits.induction import repeated_random_tokens
from hooked_lm.hooked_model import HookedModel
from hooked_lm.losses import lm_cross_entropy_loss
from hooked_lm.tasks import ioi, words
from hooked_lm.tokenization import Tokenizer, bos_id, encode, str_tokens

if TYPE_CHECKING:
    from hooked_lm.transformer import HookedTransformer

__all__ = [
    "PARAGRAPH",
    "PLACEHOLDER",
    "PLAUSIBLE_SHARE",
    "IOIDataset",
    "WhenImplausible",
    "induction_loss",
    "ioi_eval",
    "sanity_check",
]

# Loss on a paragraph

PARAGRAPH = (
    "For most of its history the town lived from the river. Boats came down in spring with timber and grain, and went "
    "back in autumn loaded with salt, cloth and tools. When the railway arrived, the harbour lost its trade within a "
    "few years, and many families moved to the city to look for work. Those who stayed behind opened small shops, or "
    "found places in the new paper mill. Today the old warehouses are full again: there is a museum in one of them, "
    "and in summer visitors sit outside the cafes and watch the water go by. Nobody knows how long this will last, "
    "but the people here have seen enough changes not to worry about the next one."
)

PLAUSIBLE_SHARE = 2 / 3  # of the loss of a uniform guess
WhenImplausible = Literal["warn", "raise", "ignore"]


@torch.no_grad()
def sanity_check(model: HookedModel, *, implausible: WhenImplausible = "warn") -> Float[Tensor, ""]:
    """Return the loss on `PARAGRAPH`, in nats a token: a quick check of whether a model was loaded correctly.

    Two thirds of the loss of a uniform guess, `log(d_vocab)`, is about the loss of a guess by the frequency of tokens:
    7.2 nats for GPT-2's vocabulary. A loss that is not below it, or is NaN, is implausible for a model of English: the
    weights, the tokenizer or the config are not those of the training. A lower loss proves little.

    Args:
        model: a `HookedTransformer` with a tokenizer. BOS is prepended by the model's default; the paragraph is cut at
            `n_ctx` tokens.
        implausible: `"warn"`, `"raise"` a ValueError, or `"ignore"` an implausible loss.

    Raises:
        ValueError: the model has no tokenizer, `implausible` is none of the three, or it is `"raise"` and the loss is
            implausible.
    """
    if implausible not in get_args(WhenImplausible):
        raise ValueError(f"implausible is 'warn', 'raise' or 'ignore', not {implausible!r}")
    # `HookedModel` has neither `truncate` nor `loss_fn`.
    whole = cast("HookedTransformer", model)
    tokens = whole.to_tokens(PARAGRAPH, truncate=False)[:, : model.cfg.n_ctx]
    loss = whole.loss_fn(at_least_single(whole(tokens)), tokens)
    uniform = math.log(model.cfg.d_vocab_out)
    if not float(loss) < PLAUSIBLE_SHARE * uniform and implausible != "ignore":  # NaN is not less
        message = (
            f"sanity_check: the loss on plain English is {float(loss):.3f} nats a token, and a uniform guess among "
            f"{model.cfg.d_vocab_out} tokens has {uniform:.3f}: the model is not trained on English, or its weights, "
            "config and tokenizer do not belong together"
        )
        if implausible == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)  # past the no_grad wrapper, to the caller
    return loss


# Loss on a repeat


@torch.no_grad()
def induction_loss(
    model: HookedModel,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 4,
    subseq_len: int = 384,
    prepend_bos: bool | None = None,
    device: str | torch.device | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return the loss on the repeat of random tokens, in nats a token: near 0 for a model with good induction heads.

    `subseq_len` random tokens occur twice in a row. The mean is over the tokens of the second half but its first, which
    cannot be predicted. The tokens of a row differ from one another, so that each determines the next; with a tokenizer
    they are its tokens, without the special ones.

    Args:
        model: a `HookedTransformer`.
        tokenizer: defines the tokens that are drawn, and BOS; by default the model's. Without one, any token is drawn.
        batch_size: the number of rows, which run together.
        subseq_len: tokens in the block that is repeated.
        prepend_bos: put BOS in front; by default as the model's `default_prepend_bos`, and not without a tokenizer.
        device: for old calls; it has to be the model's device, since the model is not moved.
        generator: the source of randomness; by default one seeded with 0, so that calls agree.

    Raises:
        ValueError: two blocks exceed the model's context, or a block has less than two tokens or more than there are;
            `prepend_bos` without a BOS token; a tokenizer with tokens that the model lacks; another device.
    """
    _check_device(model, device)
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if prepend_bos is None:
        prepend_bos = model.cfg.default_prepend_bos and tokenizer is not None
    longest = (model.cfg.n_ctx - prepend_bos) // 2
    if subseq_len > longest:
        raise ValueError(
            f"induction_loss: {subseq_len} tokens twice{' and BOS' if prepend_bos else ''} are more than this model's "
            f"n_ctx of {model.cfg.n_ctx}: subseq_len={longest} is the most it takes"
        )
    known = _ordinary_tokens(model, tokenizer)
    if batch_size < 1 or not 2 <= subseq_len <= len(known):
        raise ValueError(
            f"induction_loss repeats 2 to {len(known)} different tokens in at least one row; got "
            f"subseq_len={subseq_len}, batch_size={batch_size}"
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    # Indices into the tokens that may be drawn; the index after the last stands for BOS.
    drawn = repeated_random_tokens(batch_size, subseq_len, len(known) + 1, generator, start_token=len(known))
    tokens = torch.tensor([*known, _bos(tokenizer) if prepend_bos else 0])[drawn.cpu()]
    tokens = (tokens if prepend_bos else tokens[:, 1:]).to(model.embed.W_E.device)
    logits = model(tokens, attention_mask=torch.ones_like(tokens), logits_to_keep=subseq_len)
    return lm_cross_entropy_loss(at_least_single(logits), tokens[:, -subseq_len:])


def _check_device(model: HookedModel, device: str | torch.device | None) -> None:
    if device is None:
        return
    asked, actual = torch.device(device), model.embed.W_E.device
    if asked.type != actual.type or asked.index not in (None, actual.index or 0):
        raise ValueError(f"induction_loss runs where the model is, on {actual}, not on {asked}: move it with model.to")


def _ordinary_tokens(model: HookedModel, tokenizer: Tokenizer | None) -> list[int]:
    """Return all tokens without the special ones, in order."""
    if tokenizer is None:
        return list(range(model.cfg.d_vocab))
    known = sorted(set(tokenizer.get_vocab().values()))
    if known[-1] >= model.cfg.d_vocab:
        raise ValueError(f"the tokenizer's tokens go up to {known[-1]}, the model's only to {model.cfg.d_vocab - 1}")
    special = set(tokenizer.all_special_ids)
    return [token for token in known if token not in special]


def _bos(tokenizer: Tokenizer | None) -> int:
    """Return the token at the start."""
    if tokenizer is None:
        raise ValueError("prepend_bos=True takes a tokenizer, to know what BOS is, and the model has none: pass one")
    return bos_id(tokenizer, "prepend_bos=True")


# Indirect object identification

PLACEHOLDER = re.compile(r"\[(\w+)\]")


class IOIDataset(Dataset[dict[str, Tensor]]):
    """Sentences of indirect object identification, as tokens: one of two people gives something to the other.

    An item is `{"prompt": [pos], "IO": [1], "S": [1]}`: the tokens of a whole sentence, which ends in the indirect
    object's name `IO`; and the name `S` of the subject, which occurs twice before it. Both with their leading space.
    Special tokens other than BOS are not added, even where the tokenizer adds them by default.

    Source: Wang et al. 2022, "Interpretability in the Wild". The words are those of `hooked_lm.tasks`; a model trained
    on that task has seen some of these sentences, and `tasks.score` asks about those it has not.

    Args:
        tokenizer: of the model that is evaluated.
        templates: texts with `[A]`, the indirect object, and `[B]`, the subject, that end in ` [A]`. Every other
            `[KIND]` stands for a word of `nouns[KIND]`, the same wherever it occurs in a sentence.
        names: at least two. Each has to be one token, its leading space included.
        nouns: words by kind, each one token likewise.
        num_samples: sentences; an even number where they are `symmetric`.
        symmetric: each sentence is followed by the one with its names exchanged.
        prepend_bos: start each with BOS.
        seed: of the random draws; 0 by default, so that two datasets agree.
        generator: the source of randomness, instead of a seed.

    Where no names or no nouns are given, the words are the default ones that are a single token.

    Attributes:
        samples: for each sentence its `text` and the names `IO` and `S`, as strings.

    Raises:
        ValueError: a name or noun that is not exactly one token; fewer than two names, or one twice; a template that
            lacks a name, does not end in ` [A]`, or has an unknown kind of noun; a kind of noun that no template has; a
            number of samples below 1, or odd with `symmetric`; no BOS.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        seed: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if seed is not None and generator is not None:
            raise ValueError("an IOIDataset draws from a seed= or from a generator=, and got both")
        if num_samples < 1 or (symmetric and num_samples % 2):
            raise ValueError(f"num_samples is 1 or more, and even where symmetric=True; got {num_samples}")
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.templates = self.get_default_templates() if templates is None else _several("templates", templates)
        if names is None:
            self.names = _one_token_words(tokenizer, self.get_default_names())
        else:
            self.names = _several("names", names)
        if nouns is None:
            defaults = self.get_default_nouns().items()
            self.nouns = {kind: _one_token_words(tokenizer, several) for kind, several in defaults}
        else:
            self.nouns = {kind: _several(f"nouns[{kind!r}]", several) for kind, several in nouns.items()}
        self._check_templates(nouns_given=nouns is not None)
        for several in self.nouns.values():
            for noun in several:
                _one_token(tokenizer, "noun", noun)
        self._tokens = {name: _one_token(tokenizer, "name", name) for name in self.names}
        if len(self.names) < 2 or len(set(self._tokens.values())) < len(self.names):
            source = "of the default names this tokenizer has as one token" if names is None else "got"
            raise ValueError(f"IOI takes at least two names, each a token of its own; {source} {self.names}")
        self._start = [_bos(tokenizer)] if prepend_bos else []
        drawn_from = torch.Generator().manual_seed(0 if seed is None else integer(seed, "seed"))
        self._generator = drawn_from if generator is None else generator
        self.samples: list[dict[str, str]] = []
        while len(self.samples) < num_samples:
            self.samples += self._draw_sample(symmetric)
        self._prompts = [self._prompt(sample) for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return {
            "prompt": torch.tensor(self._prompts[index]),
            "IO": torch.tensor([self._tokens[sample["IO"]]]),
            "S": torch.tensor([self._tokens[sample["S"]]]),
        }

    @staticmethod
    def get_default_names() -> list[str]:
        """Return the default names; those that are one token are drawn from."""
        return list(words.NAMES)

    @staticmethod
    def get_default_templates() -> list[str]:
        """Return the default templates: each with either name first."""
        return [
            template.format(first=first, second=second, giver="[B]", place="[LOCATION]", object="[OBJECT]") + " [A]"
            for template in ioi.TEMPLATES
            for first, second in (("[A]", "[B]"), ("[B]", "[A]"))
        ]

    @staticmethod
    def get_default_nouns() -> dict[str, list[str]]:
        """Return the default nouns, by kind; those that are one token are drawn from."""
        return {"LOCATION": list(words.PLACES), "OBJECT": [noun for noun in words.OBJECTS if " " not in noun]}

    def _check_templates(self, nouns_given: bool) -> None:
        used = set()
        for template in self.templates:
            kinds = PLACEHOLDER.findall(template)
            if not template.endswith(" [A]") or kinds.count("A") < 2 or "B" not in kinds:
                raise ValueError(
                    f"the IOI template {template!r} should name [A] and [B] and then end in ' [A]', which is the answer"
                )
            used |= set(kinds) - {"A", "B"}
        for kind in sorted(used):
            if not self.nouns.get(kind):
                raise ValueError(
                    f"the IOI templates have [{kind}], but there are no nouns of that kind"
                    + ("" if nouns_given or kind not in self.nouns else " that this tokenizer has as one token")
                    + f": there are {', '.join(kind for kind, several in self.nouns.items() if several) or 'none'}"
                )
        unused = sorted(set(self.nouns) - used)
        if nouns_given and unused:
            raise ValueError(f"no IOI template has [{unused[0]}], for which there are nouns")

    def _draw_sample(self, symmetric: bool) -> list[dict[str, str]]:
        template = self._choice(self.templates)
        nouns = {kind: self._choice(several) for kind, several in self.nouns.items() if several}
        first = self._choice(self.names)
        second = self._choice([name for name in self.names if name != first])
        pairs = [(first, second), (second, first)] if symmetric else [(first, second)]
        return [{"text": _fill(template, nouns | {"A": io, "B": s}), "IO": io, "S": s} for io, s in pairs]

    def _choice(self, several: list[str]) -> str:
        generator = self._generator
        return several[int(torch.randint(len(several), (), generator=generator, device=generator.device))]

    def _prompt(self, sample: dict[str, str]) -> list[int]:
        tokens = encode(self.tokenizer, sample["text"])
        if tokens[-1] != self._tokens[sample["IO"]]:
            raise ValueError(
                f"the sentence {sample['text']!r} should end in the token of {sample['IO']!r}, but its last is "
                f"{str_tokens(self.tokenizer, tokens[-1:])[0]!r}"
            )
        return self._start + tokens


def _fill(template: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _several(what: str, given: Sequence[str]) -> list[str]:
    if isinstance(given, str) or not given or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{what} is a list of strings, with at least one; got {given!r}")
    return list(given)


def _spelling(tokenizer: Tokenizer, word: str) -> list[int]:
    """Return the tokens of a word inside a text, the space in front of it included; [] if they cannot be separated.

    The word is encoded after another one: at the start of a text some tokenizers insert a space.
    """
    before, both = encode(tokenizer, "to"), encode(tokenizer, f"to {word}")
    tokens = both[len(before) :]
    unknown = tokenizer.unk_token_id
    return tokens if both[: len(before)] == before and (unknown is None or unknown not in tokens) else []


def _one_token_words(tokenizer: Tokenizer, several: Sequence[str]) -> list[str]:
    return [word for word in several if len(_spelling(tokenizer, word)) == 1]


def _one_token(tokenizer: Tokenizer, what: str, word: str) -> int:
    tokens = _spelling(tokenizer, word)
    if len(tokens) != 1:
        pieces = f"{len(tokens)}: {str_tokens(tokenizer, tokens)}" if tokens else "none of its own"
        raise ValueError(
            f"the IOI {what} {word!r} should be one token here, with the space in front of it, and is {pieces}"
        )
    return tokens[0]


@torch.no_grad()
def ioi_eval(
    model: HookedModel,
    dataset: Dataset[dict[str, Tensor]] | Sequence[Mapping[str, Tensor]] | None = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Tokenizer | None = None,
    symmetric: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Return how well a model tells the indirect object from the subject: `"Logit Difference"` and `"Accuracy"`.

    The first is the logit of the indirect object less that of the subject at the end of the prompt, averaged over
    sentences; the second is the share of sentences where this difference is positive.

    Args:
        model: a `HookedTransformer`. It reads each sentence without its last token, the answer.
        dataset: an `IOIDataset`, another dataset with such items and a length, or a list of items. By default a new
            `IOIDataset` of the arguments below, with BOS by the model's default.
        batch_size: sentences that run together; it does not change the result.
        num_samples: see `IOIDataset`. Not used with a given dataset; nor is `tokenizer`.
        tokenizer: by default the model's.
        symmetric, generator: see `IOIDataset`.

    Raises:
        ValueError: neither a tokenizer nor a dataset; a dataset together with `symmetric` or `generator`, which only a
            new dataset can take; an empty dataset, or one with an item that is no such sentence; `batch_size` below 1.
    """
    if dataset is None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("ioi_eval needs a tokenizer to write its sentences, and the model has none: pass one")
        bos = model.cfg.default_prepend_bos
        dataset = IOIDataset(
            tokenizer, num_samples=num_samples, symmetric=symmetric, prepend_bos=bos, generator=generator
        )
    elif symmetric or generator is not None:
        raise ValueError("ioi_eval: the dataset is made already; give symmetric and generator to the IOIDataset")
    count = len(dataset)  # type: ignore[arg-type]
    if count < 1 or batch_size < 1:
        raise ValueError(f"ioi_eval takes at least one sentence at a time; got {count}, and batch_size={batch_size}")
    differences = [
        _logit_differences(
            model, [_checked(dataset[index], index) for index in range(start, min(start + batch_size, count))]
        )
        for start in range(0, count, batch_size)
    ]
    difference = torch.cat(differences).double()
    return {"Logit Difference": difference.mean().item(), "Accuracy": (difference > 0).double().mean().item()}


def _checked(item: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
    prompt, io, s = item["prompt"], item["IO"], item["S"]
    if prompt.ndim != 1 or len(prompt) < 2 or io.numel() != 1 or s.numel() != 1 or int(prompt[-1]) != int(io):
        raise ValueError(
            f"item {index} of the IOI dataset should have a prompt [pos] that ends in IO, and IO and S of one token; "
            f"got a prompt {prompt.tolist()}, IO {io.tolist()} and S {s.tolist()}"
        )
    return item


def _logit_differences(model: HookedModel, items: list[Mapping[str, Tensor]]) -> Float[Tensor, " batch"]:
    """Return the logit of IO less that of S after each prompt but its last token."""
    prompts = [item["prompt"][:-1] for item in items]
    tokens = torch.zeros(len(items), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # padded on the left, so that every prompt ends at the last position
        tokens[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    logits = at_least_single(model(tokens, attention_mask=mask, logits_to_keep=1)[:, -1])
    names = torch.tensor([[int(item["IO"]), int(item["S"])] for item in items], device=logits.device)
    io, s = logits.gather(-1, names).unbind(-1)
    return io - s


_DOWNLOADS = "load the texts, make rows (utils.tokenize_and_concatenate), average model(rows, return_type='loss')"
_REPLACED = {
    **dict.fromkeys(("evaluate", "evaluate_on_dataset", "DATASET_LOADERS", "DATASET_NAMES"), _DOWNLOADS),
    **{f"make_{name}_data_loader": _DOWNLOADS for name in ("code", "mmlu", "owt", "pile", "wiki")},
    "mmlu_eval": "load the questions yourself, and compare the logits of the answers' letters",
}


def __getattr__(name: str) -> object:
    raise missing("module 'hooked_lm.evals'", name, _REPLACED)
