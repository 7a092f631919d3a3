"""The logit lens: the tokens that a model would predict if it stopped at a layer (nostalgebraist 2020).

Every residual stream on the way is read as the last one is: by the model's own final norm, with the stream's own
statistics, and its own unembedding. The result is a distribution over tokens for each site and position. Its readings
are kept (likeliest tokens, ranks and probabilities of given tokens, entropy, distance to the model's own distribution);
its logits are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name
from hooked_lm.slicing import Slice
from hooked_lm.tokenization import PaddingSide, Prompts

__all__ = ["SITES", "LogitLens", "Targets", "logit_lens", "read_out"]

SITES = ("resid_pre", "resid_mid", "resid_post")
# The number of logits in a block, unless the caller gives the number of rows: 64 MB in float32.
_NUMBERS_PER_BLOCK = 2**24

Targets = str | int | Sequence[str] | Sequence[int] | Tensor
# A line of `LogitLens.rows`.
Row = dict[str, str | int | float]


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The tokens that can be read from the residual stream at each site and position. The last site is the model's end.

    Padding has no readings: numbers are NaN there, tokens and ranks -1.

    Attributes:
        labels: the sites in order of depth: `"0_pre"`, `"0_mid"`, `"0_post"`, ...
        positions: the positions of the prompt that were read, [pos].
        tokens: the prompts' tokens at these positions, before any hook, [batch pos].
        top_tokens: the likeliest tokens, the likeliest first, [component batch pos top].
        top_log_probs: their log-probabilities in nats, [component batch pos top].
        entropy: of the distribution, in nats, [component batch pos].
        kl: `KL(final || here)` in nats, [component batch pos]: from the model's final distribution to the one read here
            (the direction of Belrose et al. 2023, "Tuned Lens"). 0 at the last site.
        targets: the given target tokens, [batch pos target].
        target_ranks: how many tokens are likelier, so that 0 is the likeliest, [component batch pos target].
        target_log_probs: their log-probabilities in nats, [component batch pos target].
        strings: every token that occurs above, as a string; None without a tokenizer.
    """

    labels: tuple[str, ...]
    positions: Int[Tensor, " pos"]
    tokens: Int[Tensor, "batch pos"]
    top_tokens: Int[Tensor, "component batch pos top"]
    top_log_probs: Float[Tensor, "component batch pos top"]
    entropy: Float[Tensor, "component batch pos"]
    kl: Float[Tensor, "component batch pos"]
    targets: Int[Tensor, "batch pos target"]
    target_ranks: Int[Tensor, "component batch pos target"]
    target_log_probs: Float[Tensor, "component batch pos target"]
    strings: Mapping[int, str] | None

    @property
    def top_probs(self) -> Float[Tensor, "component batch pos top"]:
        """The probabilities of the likeliest tokens."""
        return self.top_log_probs.exp()

    @property
    def target_probs(self) -> Float[Tensor, "component batch pos target"]:
        """The probabilities of the target tokens."""
        return self.target_log_probs.exp()

    def str_token(self, token: int) -> str:
        """Return a token that occurs here as a string; its number where the model has no tokenizer."""
        return str(token) if self.strings is None else repr(self.strings[token])

    def rows(self) -> list[Row]:
        """Return a dictionary for each site, prompt and position, padding left out; `pandas.DataFrame` takes them.

        Keys: `site`, `prompt`, `pos`, `token`, `top` (the likeliest token), `top_prob`, `entropy`, `kl`, and for each
        target `target_0`, `target_0_rank`, `target_0_prob`.
        """
        real = self.tokens >= 0
        return [
            self._row(site, prompt, column)
            for site in range(len(self.labels))
            for prompt, column in real.nonzero().tolist()
        ]

    def _row(self, site: int, prompt: int, column: int) -> Row:
        at = (site, prompt, column)
        row: Row = {
            "site": self.labels[site],
            "prompt": prompt,
            "pos": int(self.positions[column]),
            "token": self.str_token(int(self.tokens[prompt, column])),
            "top": self.str_token(int(self.top_tokens[at][0])),
            "top_prob": float(self.top_log_probs[at][0].exp()),
            "entropy": float(self.entropy[at]),
            "kl": float(self.kl[at]),
        }
        for index, token in enumerate(self.targets[prompt, column].tolist()):
            row[f"target_{index}"] = self.str_token(token)
            row[f"target_{index}_rank"] = int(self.target_ranks[at][index])
            row[f"target_{index}_prob"] = float(self.target_log_probs[at][index].exp())
        return row

    def table(self, prompt: int = 0) -> str:
        """Return a prompt's likeliest tokens as text: a line for each site, the last first, a column for each position.

        Raises:
            ValueError: no such prompt.
        """
        if not 0 <= prompt < len(self.tokens):
            raise ValueError(f"no prompt {prompt}: there are prompts 0-{len(self.tokens) - 1}")
        columns = [column for column, token in enumerate(self.tokens[prompt].tolist()) if token >= 0]
        header = [f"{int(self.positions[c])} {self.str_token(int(self.tokens[prompt, c]))}" for c in columns]
        lines = [["", *header]]
        for site in reversed(range(len(self.labels))):
            best = [
                f"{self.str_token(int(self.top_tokens[site, prompt, c, 0]))} "
                f"{float(self.top_log_probs[site, prompt, c, 0].exp()):.0%}"
                for c in columns
            ]
            lines.append([self.labels[site], *best])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def logit_lens(
    model: HookedModel,
    input: Prompts,
    *,
    targets: Targets | None = None,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    positions: object = None,
    top_k: int = 5,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Tensor | None = None,
    block: int | None = None,
    verbose: bool = True,
) -> LogitLens:
    """Run a model and return the tokens that its residual stream would predict at every site, layer and position.

    The last site is the end of the model, whatever other sites are chosen: its readings are those of the model's own
    output. Hooks and interventions that are in place act in the run; those of the final norm and the unembedding act
    on that last site alone. Each other stream goes through `model.logits_of` without hooks, so that an overridden final
    norm or unembedding reads it as it reads the last. Memory: the streams, the model's logits, and two blocks of
    logits.

    Args:
        model: a `HookedTransformer`.
        input: a string, a list of strings, or tokens [pos] or [batch pos].
        targets: tokens whose rank and probability to read: one or a list, as strings or numbers, for every position; or
            a tensor [batch pos] or [batch pos target] with the tokens of each position that `positions` keeps.
        sites: some of `"resid_pre"`, `"resid_mid"` and `"resid_post"`; by default all that the model has.
        layers: the blocks to look at; by default all.
        positions: the positions to look at, anything `Slice` takes; by default all.
        top_k: how many of the likeliest tokens to keep.
        prepend_bos, padding_side, attention_mask: as for the model.
        block: positions (of all prompts together) that are unembedded at a time; by default as many as make 64 MB of
            logits in float32.
        verbose: show a progress bar.

    Raises:
        ValueError: a site that the model lacks, a layer, position or token out of range, targets that do not fit, or a
            count that is not positive.
    """
    top_k, block = integer(top_k, "top_k"), None if block is None else integer(block, "block")
    names, labels = _sites(model.cfg, sites, layers)
    limit = model.cfg.d_vocab_out
    if not 1 <= top_k <= limit or (block is not None and block < 1):
        raise ValueError(f"top_k is in 1-{limit} and block at least 1; got top_k={top_k}, block={block}")
    tokens, mask = model.tokens_and_mask(input, attention_mask, prepend_bos, padding_side)
    kept = _kept_positions(positions, tokens.shape[1], tokens.device)
    asked = _targets(model, targets, tokens.shape[0], len(kept))
    index = None if Slice.unwrap(positions).is_identity else kept
    logits, cache = model.run_with_cache(
        input,
        names_filter=sorted(set(names)),
        pos_slice=index,
        logits_to_keep=index,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
        attention_mask=attention_mask,
    )
    readings = _Readings(len(names), logits, asked, top_k)
    readings.fill(model, [cache[name] for name in names], block, verbose)
    real = torch.ones_like(tokens) if mask is None else mask.to(tokens.device)
    return readings.finished(model, labels, kept, tokens[:, kept], real[:, kept].bool())


def read_out(model: HookedModel, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
    """Return the logits that a residual stream would have at the end of the model; hooks do not act.

    That is what the model's own final norm and unembedding make of it, `model.logits_of(resid)`, whatever they compute.
    The stock ones: `soft_cap(logit_scale * (norm(resid) W_U + b_U))`, the final norm with the stream's own statistics.

    Args:
        model: a `HookedTransformer`.
        resid: a residual stream of the model's width, with any axes before that.
    """
    # The modules read [batch pos d_model]; more axes are flattened into the positions of one prompt.
    stream = resid if resid.ndim == 3 else resid.reshape(1, -1, resid.shape[-1])
    with model.only_hooks(()):
        logits = model.logits_of(stream)
    return logits.reshape(*resid.shape[:-1], logits.shape[-1])


class _Readings:
    """The readings of `n_sites` streams, and how they are taken.

    Args:
        n_sites: the last site is the end of the model.
        logits: the model's own.
        targets: the tokens whose ranks and probabilities are read.
        top_k: how many of the likeliest tokens to keep.
    """

    def __init__(
        self,
        n_sites: int,
        logits: Float[Tensor, "batch pos vocab"],
        targets: Int[Tensor, "batch pos target"],
        top_k: int,
    ) -> None:
        self.shape, self.final = logits.shape[:2], logits.flatten(0, 1)
        self.targets, n_targets = targets.flatten(0, 1), targets.shape[-1]
        n_rows, like = len(self.final), at_least_single(logits[:0])
        self.entropy, self.kl = like.new_empty(n_sites, n_rows), like.new_empty(n_sites, n_rows)
        self.top_log_probs = like.new_empty(n_sites, n_rows, top_k)
        self.top_tokens = self.targets.new_empty(n_sites, n_rows, top_k)
        self.target_log_probs = like.new_empty(n_sites, n_rows, n_targets)
        self.target_ranks = self.targets.new_empty(n_sites, n_rows, n_targets)

    def fill(
        self,
        model: HookedModel,
        streams: Sequence[Float[Tensor, "batch pos d_model"]],
        block: int | None,
        verbose: bool,
    ) -> None:
        """Read every stream, `block` positions at a time. A stream that equals the one before is not read again."""
        last = len(streams) - 1
        repeats = [site > 0 and site < last and torch.equal(streams[site - 1], streams[site]) for site in range(last)]
        size = block or max(1, _NUMBERS_PER_BLOCK // self.final.shape[-1])
        starts = range(0, len(self.final), size)
        with tqdm(total=len(starts) * (last + 1), disable=not verbose, desc="logit lens", leave=False) as bar:
            for start in starts:
                rows = slice(start, start + size)
                final = at_least_single(self.final[rows]).log_softmax(-1)
                for site, stream in enumerate(streams[:-1]):
                    if repeats[site]:
                        self._repeat(site, rows)
                    else:
                        read = read_out(model, stream.to(final.device).flatten(0, 1)[rows])
                        here = at_least_single(read).log_softmax(-1)
                        self._take(site, rows, here, final)
                    bar.update()
                self._take(last, rows, final, final)
                bar.update()

    def _take(
        self, site: int, rows: slice, here: Float[Tensor, "row vocab"], final: Float[Tensor, "row vocab"]
    ) -> None:
        best = here.topk(self.top_tokens.shape[-1], dim=-1)
        self.top_log_probs[site, rows], self.top_tokens[site, rows] = best.values, best.indices
        self.entropy[site, rows] = -(here.exp() * here).sum(-1)
        self.kl[site, rows] = (final.exp() * (final - here)).sum(-1)
        asked = here.gather(-1, self.targets[rows])
        self.target_log_probs[site, rows] = asked
        for target in range(asked.shape[-1]):
            self.target_ranks[site, rows, target] = (here > asked[:, target, None]).sum(-1)

    def _repeat(self, site: int, rows: slice) -> None:
        for reading in self._all():
            reading[site, rows] = reading[site - 1, rows]

    def _all(self) -> tuple[Tensor, ...]:
        numbers = (self.entropy, self.kl, self.top_log_probs, self.target_log_probs)
        return (*numbers, self.top_tokens, self.target_ranks)

    def finished(
        self,
        model: HookedModel,
        labels: tuple[str, ...],
        positions: Int[Tensor, " pos"],
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
    ) -> LogitLens:
        """Return the readings under their names, with the readings at padding wiped out."""
        padding = ~real.flatten()
        for reading in self._all():
            reading[:, padding] = float("nan") if reading.is_floating_point() else -1

        def unflat(reading: Tensor) -> Tensor:
            return torch.unflatten(reading, 1, self.shape)

        tokens = tokens.masked_fill(~real, -1)
        return LogitLens(
            labels=labels,
            positions=positions,
            tokens=tokens,
            top_tokens=unflat(self.top_tokens),
            top_log_probs=unflat(self.top_log_probs),
            entropy=unflat(self.entropy),
            kl=unflat(self.kl),
            targets=torch.unflatten(self.targets, 0, self.shape),
            target_ranks=unflat(self.target_ranks),
            target_log_probs=unflat(self.target_log_probs),
            strings=_strings(model, tokens, self.top_tokens, self.targets),
        )


def _strings(model: HookedModel, *tokens: Tensor) -> dict[int, str] | None:
    if model.tokenizer is None:
        return None
    occurring = sorted({int(token) for some in tokens for token in some.flatten().tolist() if token >= 0})
    return {token: model.to_single_str_token(token) for token in occurring}


# Checks of the arguments


def _sites(
    cfg: HookedTransformerConfig, sites: Sequence[str] | None, layers: Sequence[int] | None
) -> tuple[list[str], tuple[str, ...]]:
    """Return hook names and labels in order of depth; the end of the model is always the last."""
    if cfg.n_layers == 0:
        raise ValueError("the logit lens looks between layers, and this model has none")
    has_mid = not (cfg.attn_only or cfg.parallel_attn_mlp)
    there = tuple(site for site in SITES if has_mid or site != "resid_mid")
    wanted = there if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    unknown = [site for site in wanted if site not in there]
    if unknown or not wanted:
        why = "" if has_mid else "; attention-only and parallel blocks have no resid_mid"
        raise ValueError(f"sites are some of {', '.join(there)}{why}; got {sites!r}")
    chosen = list(range(cfg.n_layers)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= cfg.n_layers:
        raise ValueError(f"layers are some of 0-{cfg.n_layers - 1}, got {layers!r}")
    places = [(layer, site) for layer in chosen for site in there if site in wanted]
    end = (cfg.n_layers - 1, "resid_post")
    places += [] if places[-1] == end else [end]
    labels = tuple(f"{layer}_{site.removeprefix('resid_')}" for layer, site in places)
    return [get_act_name(site, layer) for layer, site in places], labels


def _kept_positions(positions: object, n_pos: int, device: torch.device) -> Int[Tensor, " pos"]:
    kept = torch.as_tensor(Slice.unwrap(positions).indices(n_pos), device=device)
    if kept.numel() == 0:
        raise ValueError(f"positions {positions!r} pick none of the {n_pos} there are")
    return kept


def _targets(model: HookedModel, targets: Targets | None, batch: int, n_pos: int) -> Int[Tensor, "batch pos target"]:
    device, limit = model.W_U.device, model.cfg.d_vocab_out
    if isinstance(targets, Tensor) and targets.ndim > 0:
        asked = targets[..., None] if targets.ndim == 2 else targets
        if asked.ndim != 3 or tuple(asked.shape[:2]) != (batch, n_pos) or asked.is_floating_point():
            raise ValueError(
                f"a tensor of targets is integers [batch pos] or [batch pos target], here with batch {batch} and pos "
                f"{n_pos}; got {targets.dtype} {tuple(targets.shape)}. Tokens for every position go in a list"
            )
    else:
        several = [] if targets is None else list(targets) if isinstance(targets, (list, tuple)) else [targets]
        numbers = [model.to_single_token(one) if isinstance(one, str) else int(cast(int, one)) for one in several]
        asked = rearrange(torch.tensor(numbers, dtype=torch.long), "target -> 1 1 target").expand(batch, n_pos, -1)
    if asked.numel() and not (int(asked.min()) >= 0 and int(asked.max()) < limit):
        raise ValueError(f"targets are tokens 0-{limit - 1}, got {int(asked.min())} to {int(asked.max())}")
    return asked.to(device, torch.long)
