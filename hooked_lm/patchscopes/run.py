"""patchscope: put a hidden state of one prompt into another, and let the model go on.

Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models".
A state is taken at a layer and position of a source prompt, goes through a mapping if one is given, and replaces the
state at a layer and position of a target prompt. What the model then says of the target is a reading of the state: with
a prompt that repeats words its next token, with a question about a country the country's capital.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import Answers, answer_tokens, chosen_layers
from hooked_lm.generation.methods import TextGeneration
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.kv_cache import HookedTransformerKeyValueCache, HookedTransformerKeyValueCacheEntry
from hooked_lm.names import get_act_name
from hooked_lm.patchscopes.result import Patchscope
from hooked_lm.patchscopes.target import TargetPrompt, target_of
from hooked_lm.probing.positions import Positions, TokensAt, activations_at
from hooked_lm.sweep.exactness import walking_obstacle
from hooked_lm.tokenization import Prompts

__all__ = ["Mapped", "ScopeSite", "patchscope", "require_next_token"]

ScopeSite = Literal["resid_pre", "resid_mid", "resid_post"]
# From states [example d_model], the source layer and the target layer to states [example d_model].
Mapped = Callable[[Tensor, int, int], Tensor]


@torch.no_grad()
def patchscope(
    model: HookedModel,
    source_prompts: Prompts,
    target_prompt: Prompts | TargetPrompt,
    *,
    source_pos: Positions = -1,
    source_layers: Sequence[int] | None = None,
    target_pos: int | None = None,
    target_layers: Sequence[int] | None = None,
    mapping: Mapped | None = None,
    answers: Answers | None = None,
    max_new_tokens: int = 0,
    site: ScopeSite = "resid_post",
    top_k: int = 5,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> Patchscope:
    """Return what the model says after a target prompt into which states of source prompts were put.

    The sources run once. Each state then runs in a copy of the target prompt; copies for any layers share a batch, and
    only the last position is unembedded. What the target has before the state's position runs once for all, unless
    hooks are in place, which act in all runs, before the state is put in.

    Args:
        model: a `HookedTransformer`, causal.
        source_prompts: strings of any lengths, or tokens [batch pos].
        target_prompt: a string, tokens [pos], or a `TargetPrompt` such as `identity_prompt` returns.
        source_pos: whose state: a position in every source prompt, or one for each, as for `TokensAt.of`.
        source_layers: the blocks that states are taken from; negative from the end, all by default.
        target_pos: whose state is replaced; by default the target prompt's own position, or its last.
        target_layers: the blocks that states are put into, every source layer into each; by default each state goes
            back into its own layer.
        mapping: from states [example d_model], source layer and target layer to states of the target layer, such as
            `fit_affine_maps` returns; None for the states as they are.
        answers: a token, or one for each prompt, whose rank and probability are read.
        max_new_tokens: tokens that the target is continued by, greedily.
        site: the stream before, within or after a block.
        top_k: how many of the likeliest next tokens to keep.
        attention_mask: [batch pos], 0 at padding, for source tokens.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: the model has no such site.
        ValueError: a layer or position that is not there, several positions of a source prompt, several target prompts,
            a mapping that returns another shape or numbers that are not finite, answers that are no tokens, a model
            that does not predict the next token, or a count out of range.
    """
    require_next_token(model, "a patchscope")
    _check_counts(model, site, top_k, max_new_tokens, batch_size)
    target = target_of(model, target_prompt, target_pos)
    tokens = TokensAt.of(model, source_prompts, source_pos, attention_mask)
    if not torch.equal(tokens.rows, torch.arange(len(tokens.prompts))):
        raise ValueError("a source is one state of each prompt: give one position for each")
    asked = None if answers is None else answer_tokens(model, answers, len(tokens))
    sources = chosen_layers(model, source_layers)
    targets = sources if target_layers is None else chosen_layers(model, target_layers)
    is_grid = target_layers is not None
    read_from = tuple(dict.fromkeys(sources))
    states = activations_at(
        model, tokens, site, read_from, batch_size=batch_size, device=model.embed.W_E.device, verbose=verbose
    )
    pairs = (
        [(one, other) for one in sources for other in targets] if is_grid else list(zip(sources, targets, strict=True))
    )
    put = [_mapped(mapping, states[read_from.index(one)], one, other) for one, other in pairs]
    layers = torch.tensor([other for _, other in pairs]).repeat_interleave(len(tokens))
    scope = _Scope(model, target, site, top_k, max_new_tokens, _prefix(model, target, max_new_tokens))
    columns = scope.read(torch.cat(put), layers, asked, batch_size, verbose)
    return _result(model, columns, target, site, sources, targets, is_grid, tokens.tokens, asked)


def require_next_token(model: HookedModel, what: str) -> None:
    """Check that a model predicts the next token.

    Args:
        model: a `HookedTransformer`.
        what: needs that; for the message.

    Raises:
        ValueError: it does not, as its attention is not causal.
    """
    if model.cfg.attention_dir != "causal":
        raise ValueError(f"{what} reads the next token, and this model's attention is {model.cfg.attention_dir}")


def _check_counts(model: HookedModel, site: str, top_k: int, max_new_tokens: int, batch_size: int) -> None:
    if site not in get_args(ScopeSite):
        raise ValueError(f"site is one of {', '.join(get_args(ScopeSite))}, not {site!r}")
    limit = model.cfg.d_vocab_out
    if not 1 <= integer(top_k, "top_k") <= limit:
        raise ValueError(f"top_k is in 1-{limit}, got {top_k}")
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("batch_size", batch_size, 1)):
        if integer(value, name) < least:
            raise ValueError(f"{name} is {least} or more, got {value}")


def _mapped(
    mapping: Mapped | None, states: Float[Tensor, "example d_model"], source: int, target: int
) -> Float[Tensor, "example d_model"]:
    if mapping is None:
        return states
    mapped = mapping(states, source, target)
    if not isinstance(mapped, Tensor) or mapped.shape != states.shape or not bool(mapped.isfinite().all()):
        raise ValueError(
            f"a mapping returns finite states of the shape that it got, {tuple(states.shape)}; from layer {source} to "
            f"{target} it returned {tuple(mapped.shape) if isinstance(mapped, Tensor) else mapped!r}"
        )
    return mapped.to(states)


@dataclass(frozen=True)
class _Read:
    """Readings of states: log-probabilities and tokens, one row for each state."""

    top_log_probs: Float[Tensor, "state top"]
    top_tokens: Int[Tensor, "state top"]
    ranks: Int[Tensor, " state"]
    log_probs: Float[Tensor, " state"]
    new: Int[Tensor, "state new"]


def _prefix(model: HookedModel, target: TargetPrompt, max_new_tokens: int) -> HookedTransformerKeyValueCache | None:
    """The keys and values of what comes before the state, which no state changes; None where whole prompts run."""
    # A generation keeps a cache of its own.
    if target.pos == 0 or max_new_tokens or walking_obstacle(model, ()) is not None:
        return None
    tokens = target.tokens[None, : target.pos]
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, tokens.device, 1)
    model(tokens, return_type=None, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))
    return cache


def _repeated(cache: HookedTransformerKeyValueCache, n: int) -> HookedTransformerKeyValueCache:
    """The cache of so many copies of its prompt."""
    entries = [
        HookedTransformerKeyValueCacheEntry(
            entry.past_keys.expand(n, -1, -1, -1), entry.past_values.expand(n, -1, -1, -1)
        )
        for entry in cache.entries
    ]
    return HookedTransformerKeyValueCache(entries, cache.previous_attention_mask.expand(n, -1))


@dataclass(frozen=True)
class _Scope:
    """A target prompt, and how it is read; `prefix` is the part before the state, where that runs once."""

    model: HookedModel
    target: TargetPrompt
    site: ScopeSite
    top_k: int
    max_new_tokens: int
    prefix: HookedTransformerKeyValueCache | None

    def read(
        self,
        states: Float[Tensor, "state d_model"],
        layers: Int[Tensor, " state"],
        answers: Int[Tensor, " prompt"] | None,
        batch_size: int,
        verbose: bool,
    ) -> _Read:
        """Read every state in a copy of the target, put into its layer."""
        asked = (
            torch.zeros(len(states), dtype=torch.long)
            if answers is None
            else answers.repeat(len(states) // len(answers))
        )
        parts = []
        starts = range(0, len(states), batch_size)
        for start in tqdm(starts, disable=not verbose, desc="patchscope", leave=False):
            rows = slice(start, start + batch_size)
            logits, new = self._run(states[rows], layers[rows])
            log_probs = at_least_single(logits).log_softmax(-1)
            best = log_probs.topk(self.top_k, dim=-1)
            own = log_probs.gather(-1, asked[rows, None].to(log_probs.device))
            parts.append(_Read(best.values, best.indices, (log_probs > own).sum(-1), own[:, 0], new))
        names = ("top_log_probs", "top_tokens", "ranks", "log_probs")
        joined = {name: torch.cat([getattr(part, name) for part in parts]).cpu() for name in names}
        return _Read(**joined, new=_joined([part.new.cpu() for part in parts]))

    def _run(self, states: Tensor, layers: Tensor) -> tuple[Float[Tensor, "state vocab"], Int[Tensor, "state new"]]:
        """Return the logits of the next token, and the continuation."""
        tokens = self.target.tokens.expand(len(states), -1)
        patches = [self._patch(states, layers, layer) for layer in layers.unique().tolist()]
        # An explicit mask, so that a token that is also used for padding is read as a token.
        mask = torch.ones_like(tokens)
        if self.max_new_tokens == 0:
            start, past = (0, None) if self.prefix is None else (self.target.pos, _repeated(self.prefix, len(states)))
            logits = self.model.run(
                tokens[:, start:],
                interventions=patches,
                logits_to_keep=1,
                attention_mask=mask[:, start:],
                past_kv_cache=past,
            )
            return cast(Tensor, logits)[:, -1], tokens[:, :0]
        made = cast(TextGeneration, self.model).generate(
            tokens,
            self.max_new_tokens,
            do_sample=False,
            interventions=patches,
            output_logits=True,
            stop_at_eos=self.model.tokenizer is not None,
            verbose=False,
            attention_mask=mask,
        )
        sequences, steps = cast("tuple[Tensor, tuple[Tensor, ...]]", made)
        return steps[0], sequences[:, tokens.shape[1] :]

    def _patch(self, states: Tensor, layers: Tensor, layer: int) -> Intervention:
        rows = (layers == layer).nonzero().flatten()
        value = states[rows.to(states.device)]
        return Intervention(
            get_act_name(self.site, layer), "replace", value, pos=self.target.pos, batch=tuple(rows.tolist())
        )


def _joined(parts: Sequence[Int[Tensor, "_ _"]]) -> Int[Tensor, "state new"]:
    """Continuations of several batches; where a batch ended early, its last tokens, which end texts, are repeated."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat(
        [torch.cat((part, part[:, -1:].expand(-1, longest - part.shape[1])), 1) if longest else part for part in parts]
    )


def _result(
    model: HookedModel,
    read: _Read,
    target: TargetPrompt,
    site: ScopeSite,
    sources: tuple[int, ...],
    targets: tuple[int, ...],
    is_grid: bool,
    source_tokens: Int[Tensor, " prompt"],
    asked: Int[Tensor, " prompt"] | None,
) -> Patchscope:
    shape = (-1, len(source_tokens))
    new = read.new.unflatten(0, shape) if read.new.shape[1] else None
    others = [] if asked is None else [asked.cpu()]
    occurring = torch.cat([read.top_tokens.flatten(), source_tokens.cpu(), *others]).unique().tolist()
    return Patchscope(
        site=site,
        target=target,
        source_layers=sources,
        target_layers=targets,
        is_grid=is_grid,
        source_tokens=source_tokens,
        top_tokens=read.top_tokens.unflatten(0, shape),
        top_log_probs=read.top_log_probs.unflatten(0, shape),
        answers=None if asked is None else asked.cpu(),
        answer_ranks=None if asked is None else read.ranks.unflatten(0, shape),
        answer_log_probs=None if asked is None else read.log_probs.unflatten(0, shape),
        new_tokens=new,
        texts=None if new is None else tuple(tuple(_text(model, row) for row in cell) for cell in new),
        strings=None if model.tokenizer is None else {one: model.to_single_str_token(one) for one in occurring},
    )


def _text(model: HookedModel, tokens: Int[Tensor, " new"]) -> str:
    """A continuation as text, up to the token that ends it."""
    if model.tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    eos = model.tokenizer.eos_token_id
    ends = [] if eos is None else (tokens == eos).nonzero().flatten().tolist()
    return str(model.to_string(tokens[: ends[0]] if ends else tokens))
