"""patchscope: put hidden states of some prompts into another prompt, and read what the model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm.circuits.last_token import chosen_layers
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.names import get_act_name
from hooked_lm.patching.statistics import bootstrap_interval
from hooked_lm.patchscopes.result import Patchscope, ReadingPrecision
from hooked_lm.probing import Positions, TokensAt, activations_at
from hooked_lm.tokenization import Prompts
from hooked_lm.transformer import HookedTransformer

__all__ = ["Mapping", "identity_prompt", "patchscope", "reading_precision"]

# Activations [example d_model] of a source layer, and both layers -> activations for the target layer.
Mapping = Callable[[Tensor, int, int], Tensor]
_SITES = ("resid_pre", "resid_mid", "resid_post")


def identity_prompt(
    model: HookedModel, words: Sequence[str], arrow: str = "->", separator: str = "\n", placeholder: str | None = None
) -> Int[Tensor, "1 pos"]:
    """Return a prompt that shows words repeated, and ends in a placeholder to be replaced: `cat->cat`, `x`.

    The target prompt of Ghandeharioun et al. 2024 for reading the token that a state stands for.

    Args:
        model: with a tokenizer.
        words: each a single token, as it stands.
        arrow: between a word and its repetition.
        separator: after each pair.
        placeholder: the last token; by default the first word.

    Raises:
        ValueError: no words, or one that is not a single token.
    """
    if not words or isinstance(words, str):
        raise ValueError("an identity prompt shows some words: give a list of them")
    last = placeholder if placeholder is not None else words[0]
    for word in (*words, last):
        if model.to_tokens(word, False).shape[1] != 1:
            raise ValueError(f"{word!r} is {model.to_tokens(word, False).shape[1]} tokens, and a word here is one")
    pieces = [piece for word in words for piece in (word, arrow, word, separator)]
    tokens = [model.to_tokens(piece, False) for piece in (*pieces, last) if piece]
    if model.cfg.default_prepend_bos and model.tokenizer is not None and model.tokenizer.bos_token_id is not None:
        tokens.insert(0, torch.tensor([[model.tokenizer.bos_token_id]], device=tokens[0].device))
    return torch.cat(tokens, 1)


@torch.no_grad()
def patchscope(
    model: HookedTransformer,
    source: Prompts,
    target: str | Tensor,
    *,
    source_pos: Positions = -1,
    target_pos: int = -1,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    site: str = "resid_post",
    mapping: Mapping | None = None,
    answers: Sequence[str] | Int[Tensor, " prompt"] | None = None,
    k: int = 5,
    max_new_tokens: int = 0,
    batch_size: int = 64,
    verbose: bool = True,
) -> Patchscope:
    """Return what the target prompt is continued by, with each source prompt's hidden states in it.

    A state of layer l at the source position takes the place of the state of layer l' at the target position, and the
    model goes on from there (Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden
    Representations of Language Models"). What it says shows what it can read in the state; that it used the same in the
    source prompt does not follow.

    Args:
        model: a `HookedTransformer`.
        source: prompts whose states are read.
        target: one prompt, into which they are put; `identity_prompt` makes one.
        source_pos: of each source prompt, as for `probing.TokensAt.of`, one position for each.
        target_pos: in the target prompt.
        source_layers: by default all.
        target_layers: by default each state goes into its own layer; otherwise into each of these.
        site: `"resid_pre"`, `"resid_mid"` or `"resid_post"`.
        mapping: of activations and the two layers, such as `fit_affine_maps` gives; by default as they are.
        answers: one token for each source prompt, whose log-probability is given.
        k: how many of the likeliest tokens to keep.
        max_new_tokens: continue by so many tokens too, the likeliest at each step.
        batch_size: runs of the target prompt at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: a site that is no stream, more than one target prompt, positions or layers that are not there, or
            answers that are not one token for each prompt.
    """
    if site not in _SITES:
        raise ValueError(f"site is one of {', '.join(_SITES)}, got {site!r}")
    if integer(k, "k") < 1 or integer(batch_size, "batch_size") < 1 or integer(max_new_tokens, "max_new_tokens") < 0:
        raise ValueError(
            f"k and batch_size are 1 or more, max_new_tokens 0 or more: {k}, {batch_size}, {max_new_tokens}"
        )
    if model.cfg.attention_dir != "causal":
        raise ValueError("a patchscope reads the next token, and this model's attention is bidirectional")
    into = _target_tokens(model, target, target_pos)
    tokens = TokensAt.of(model, source, source_pos)
    if len(tokens) != len(tokens.prompts):
        raise ValueError(
            f"source_pos gives {len(tokens)} positions for {len(tokens.prompts)} prompts: give one for each"
        )
    sources = chosen_layers(model, source_layers)
    targets = None if target_layers is None else chosen_layers(model, target_layers)
    states = activations_at(model, tokens, site, sources, batch_size=batch_size, verbose=verbose)
    answer = None if answers is None else _answers(model, answers, len(tokens))
    runs = _Runs(model, into, target_pos % into.shape[1], site, k, max_new_tokens, batch_size, answer)
    columns: list[list[_Read]] = []
    for index, layer in enumerate(tqdm(sources, disable=not verbose, desc="patchscope", leave=False)):
        row = []
        for place in (layer,) if targets is None else targets:
            vectors = states[index].to(into.device)
            if mapping is not None:
                vectors = mapping(vectors, layer, place)
                if vectors.shape != states[index].shape:
                    raise ValueError(f"the mapping made {tuple(vectors.shape)} of {tuple(states[index].shape)}")
            row.append(runs.read(vectors, place))
        columns.append(row)
    base = model(into)[0, -1].topk(min(k, model.cfg.d_vocab_out)).indices.cpu()
    return _collected(model, site, sources, targets, columns, base, answer is not None, max_new_tokens > 0)


def _target_tokens(model: HookedModel, target: str | Tensor, target_pos: int) -> Int[Tensor, "1 pos"]:
    tokens, _ = model.tokens_and_mask(target)
    if len(tokens) != 1:
        raise ValueError(f"states are put into one target prompt, got {len(tokens)}")
    if not -tokens.shape[1] <= integer(target_pos, "target_pos") < tokens.shape[1]:
        raise ValueError(f"the target prompt has {tokens.shape[1]} tokens, and no position {target_pos}")
    return tokens


def _answers(model: HookedModel, answers: Sequence[str] | Tensor, n: int) -> Int[Tensor, " prompt"]:
    found = answers if isinstance(answers, Tensor) else torch.tensor([model.to_single_token(one) for one in answers])
    if found.shape != (n,):
        raise ValueError(f"answers are one for each of the {n} source prompts, got shape {tuple(found.shape)}")
    return found.cpu()


class _Read:
    """What was read for all prompts at one pair of layers."""

    def __init__(self, tokens: Tensor, scores: Tensor, answers: Tensor | None, texts: list[str]) -> None:
        self.tokens, self.scores, self.answers, self.texts = tokens, scores, answers, texts


class _Runs:
    """Runs of the target prompt with other vectors in it."""

    def __init__(
        self,
        model: HookedTransformer,
        into: Tensor,
        pos: int,
        site: str,
        k: int,
        max_new_tokens: int,
        batch_size: int,
        answers: Tensor | None,
    ) -> None:
        self.model, self.into, self.pos, self.site = model, into, pos, site
        self.k, self.length, self.batch_size, self.answers = k, max_new_tokens, batch_size, answers

    def read(self, vectors: Float[Tensor, "example d_model"], layer: int) -> _Read:
        tokens, scores, answers, texts = [], [], [], list[str]()
        for rows in torch.arange(len(vectors)).split(self.batch_size):
            edit = Intervention(
                get_act_name(self.site, layer), "replace", vectors[rows.to(vectors.device)], pos=self.pos
            )
            prompts = self.into.expand(len(rows), -1)
            logits = cast(Tensor, self.model.run(prompts, interventions=[edit], logits_to_keep=1))[:, -1]
            log_probs = logits.log_softmax(-1).cpu()
            best = log_probs.topk(min(self.k, log_probs.shape[-1]))
            tokens.append(best.indices)
            scores.append(best.values)
            if self.answers is not None:
                answers.append(log_probs.gather(-1, self.answers[rows, None])[:, 0])
            if self.length:
                texts += self._continued(prompts, edit)
        return _Read(torch.cat(tokens), torch.cat(scores), torch.cat(answers) if answers else None, texts)

    def _continued(self, prompts: Tensor, edit: Intervention) -> list[str]:
        made = self.model.generate(
            prompts,
            max_new_tokens=self.length,
            do_sample=False,
            stop_at_eos=False,
            interventions=[edit],
            return_type="tokens",
            verbose=False,
        )
        new = cast(Tensor, made)[:, prompts.shape[1] :]
        if self.model.tokenizer is None:
            return [" ".join(map(str, row.tolist())) for row in new]
        return [cast(str, self.model.to_string(row)) for row in new]


def _collected(
    model: HookedModel,
    site: str,
    sources: Sequence[int],
    targets: Sequence[int] | None,
    grid: list[list[_Read]],
    base: Tensor,
    with_answers: bool,
    with_texts: bool,
) -> Patchscope:

    def stacked(part: str) -> Tensor:
        return torch.stack([torch.stack([getattr(read, part) for read in row], 1) for row in grid], 1)

    tokens = stacked("tokens")
    occurring = {*tokens.flatten().tolist(), *base.tolist()}
    texts = None
    if with_texts:
        texts = tuple(
            tuple(tuple(read.texts[prompt] for read in row) for row in grid) for prompt in range(tokens.shape[0])
        )
    return Patchscope(
        site=site,
        source_layers=tuple(sources),
        target_layers=() if targets is None else tuple(targets),
        top_tokens=tokens,
        top_log_probs=stacked("scores"),
        answer_log_probs=stacked("answers") if with_answers else None,
        base_tokens=base,
        texts=texts,
        strings=None if model.tokenizer is None else {one: model.to_single_str_token(one) for one in occurring},
    )


@torch.no_grad()
def reading_precision(
    model: HookedTransformer,
    prompts: Prompts,
    target: str | Tensor,
    *,
    target_pos: int = -1,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    mapping: Mapping | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    verbose: bool = True,
) -> ReadingPrecision:
    """Return how often the last token's state tells the model's own next token, by a patchscope and by the logit lens.

    The patchscope puts the state into the target prompt at the same layer. Both are right where their likeliest token
    is the one that the model finds likeliest after the prompt.

    Args:
        model: a `HookedTransformer`.
        prompts: two or more.
        target, target_pos, site, mapping, batch_size, verbose: as for `patchscope`.
        layers: by default all.
        n_resamples, seed: of the bootstrap interval over prompts.

    Raises:
        ValueError: one prompt, or as `patchscope`.
    """
    found = patchscope(
        model,
        prompts,
        target,
        target_pos=target_pos,
        source_layers=layers,
        site=site,
        mapping=mapping,
        k=1,
        batch_size=batch_size,
        verbose=verbose,
    )
    tokens = TokensAt.of(model, prompts, -1)
    if len(tokens) < 2:
        raise ValueError("one prompt has no interval: give several")
    states = activations_at(model, tokens, site, found.source_layers, batch_size=batch_size, verbose=False)
    final = activations_at(model, tokens, "resid_post", [model.cfg.n_layers - 1], batch_size=batch_size, verbose=False)
    # Rows as positions of one prompt.
    own = model.logits_of(final.to(model.W_U))[0].argmax(-1).cpu()
    right = (found.top_tokens[:, :, 0, 0] == own[:, None]).double().T
    lens = torch.stack([model.logits_of(one.to(model.W_U)[None])[0].argmax(-1).cpu() == own for one in states]).double()
    ends = [torch.stack(bootstrap_interval(one, 0.95, n_resamples, seed)) for one in (right, lens)]
    return ReadingPrecision(found.source_layers, right.mean(-1), lens.mean(-1), ends[0], ends[1], len(tokens))
