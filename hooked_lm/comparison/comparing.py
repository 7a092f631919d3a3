"""compare: two models, checkpoints or processing variants, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import integer
from hooked_lm.comparison.result import CheckpointComparison, EffectDifferences, ModelComparison, SiteDifference
from hooked_lm.comparison.weights import compare_configs, compare_weights
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric
from hooked_lm.names import NamesFilter, get_act_name
from hooked_lm.patching.statistics import bootstrap_interval
from hooked_lm.sweep import sweep
from hooked_lm.tokenization import Prompts
from hooked_lm.transformer import HookedTransformer

__all__ = ["compare", "compare_checkpoints"]

# The relative difference of two computations of one number that rounding explains: 1e-5 in float32 is what parity
# certificates hold over all families; in half precision, a few times its resolution.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_LOG_PROBS = "log-probabilities"
Checkpoint = HookedModel | str | Path | Callable[[], HookedModel]


def compare(
    a: HookedModel,
    b: HookedModel,
    prompts: Prompts,
    *,
    sites: NamesFilter | None = None,
    metric: Metric | None = None,
    interventions: Sequence[Intervention] | None = None,
    tolerance: float | None = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
    n_resamples: int = 1000,
    seed: int = 0,
    verbose: bool = True,
) -> ModelComparison:
    """Return where two models differ: config, weights, the first site of their activations, outputs, effects.

    Activations that processing changes are compared in the part that it keeps: residual streams less their mean where
    one model's writing weights are centred, and outputs as log-probabilities. Sites that mean something else in the two
    models (values, where value biases were folded) are left out, with a note. Both models run on the same tokens, a
    batch at a time; padding is left out.

    Args:
        a, b: two models with one vocabulary; the prompts are read by `a`.
        prompts: strings of any lengths, or tokens [prompt pos].
        sites: as for `run_with_cache`; by default what an unfiltered cache holds.
        metric: one of `hooked_lm.metrics`, for the effects.
        interventions: whose effects are compared; by default each head's output set to 0.
        tolerance: the relative difference that counts as rounding; by default 1e-9 in float64, 1e-5 in float32, 0.01 in
            float16, 0.08 in bfloat16, of the coarser of the two models.
        attention_mask: [prompt pos], 0 at padding, for tokens.
        batch_size: prompts that are run at a time.
        n_resamples, seed: of the interval of the divergence.
        verbose: show a progress bar.

    Raises:
        ValueError: models of other vocabularies, a setting out of range, or prompts that do not fit.
        UnknownHookError: a model has no such site.
    """
    if a.cfg.d_vocab_out != b.cfg.d_vocab_out or a.cfg.d_vocab != b.cfg.d_vocab:
        raise ValueError(
            f"the models have {a.cfg.d_vocab} and {b.cfg.d_vocab} tokens: outputs are compared token by token. "
            "compare_configs and compare_weights take any two models"
        )
    if integer(batch_size, "batch_size") < 1 or (tolerance is not None and not tolerance >= 0):
        raise ValueError(f"batch_size is at least 1 and tolerance not negative, got {batch_size} and {tolerance}")
    # On the left, so that position -1 is each prompt's last token, as metrics read it.
    tokens, mask = a.tokens_and_mask(prompts, attention_mask, padding_side="left")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    weights, n_weights = compare_weights(a, b)
    walk = _PairedRuns(a, b, tokens, real.cpu(), _tolerance(a, b) if tolerance is None else tolerance, sites)
    for rows in tqdm(
        list(torch.arange(len(tokens)).split(batch_size)), disable=not verbose, desc="compare", leave=False
    ):
        walk.run(rows)
    low, high = float("nan"), float("nan")
    if len(tokens) > 1:
        ends = bootstrap_interval(
            walk.mean_kl(), n_resamples=n_resamples, seed=seed, weights=real.cpu().sum(-1).double()
        )
        low, high = (float(one) for one in ends)
    effects = None if metric is None else _effects(a, b, tokens, mask, metric, interventions, verbose)
    shown = tokens.cpu().where(real.cpu(), -1)
    return ModelComparison(
        config=tuple(compare_configs(a, b)),
        weights=tuple(weights),
        n_weights=n_weights,
        processing=None if a.processed == b.processed else (a.processed, b.processed),
        sites=tuple(walk.found()),
        tolerance=walk.tolerance,
        tokens=shown,
        strings=None
        if a.tokenizer is None
        else {int(one): a.to_single_str_token(int(one)) for one in shown.unique() if one >= 0},
        kl=walk.kl,
        kl_low=low,
        kl_high=high,
        same_argmax=float(walk.agrees[real.cpu()].double().mean()),
        loss_a=walk.loss(0),
        loss_b=walk.loss(1),
        effects=effects,
    )


def _tolerance(a: HookedModel, b: HookedModel) -> float:
    return max(_ROUNDING.get(model.cfg.dtype, 1e-5) for model in (a, b))


@dataclass
class _Seen:
    """The differences of a site, over the batches so far."""

    absolute: float = 0.0
    scale: float = 0.0
    gaps: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # rows, and the largest gap [row pos]


class _PairedRuns:
    """Both models over the prompts, a batch at a time: of each site only the gap of each position is kept."""

    def __init__(
        self, a: HookedModel, b: HookedModel, tokens: Tensor, real: Tensor, tolerance: float, sites: NamesFilter | None
    ) -> None:
        self.models, self.tokens, self.real, self.tolerance, self.filter = (a, b), tokens, real, tolerance, sites
        self.seen: dict[str, _Seen] = {}
        self.notes: dict[str, str] = {}
        self.kl = torch.full(tokens.shape, float("nan"), dtype=torch.float64)
        self.agrees = torch.zeros(tokens.shape, dtype=torch.bool)
        self.losses = [torch.full(tokens.shape, float("nan"), dtype=torch.float64) for _ in range(2)]

    @torch.no_grad()
    def run(self, rows: Tensor) -> None:
        """Run both models on some of the prompts, and compare what they compute.

        Args:
            rows: the numbers of the prompts.
        """
        outputs, caches = [], []
        for model in self.models:
            place = next(iter(model.parameters())).device
            logits, cache = model.run_with_cache(
                self.tokens[rows].to(place),
                attention_mask=self.real[rows].long().to(place),
                names_filter=self.filter,
                return_cache_object=False,
            )
            outputs.append(cast(Tensor, logits).double().cpu().log_softmax(-1))
            caches.append(cache)
        for name in caches[0]:
            if name in caches[1]:
                self._see(name, caches[0][name], caches[1][name], rows)
        self._see_outputs(outputs[0], outputs[1], rows)

    def _see(self, name: str, one: Tensor, other: Tensor, rows: Tensor) -> None:
        how = _comparable(name, *self.models)
        if how == "same":
            pass
        elif how == "centred":
            self.notes[name] = "less its mean, which processing takes out"
        else:
            self.notes[name] = how
            self.seen.setdefault(name, _Seen(float("nan"), float("nan")))
            return
        if one.shape != other.shape:
            self.notes[name] = f"shapes {tuple(one.shape[1:])} and {tuple(other.shape[1:])}"
            self.seen.setdefault(name, _Seen(float("nan"), float("nan")))
            return
        if not one.is_floating_point():
            one, other = one.double(), other.double()
        x, y = one.double().cpu(), other.double().cpu()
        if how == "centred":
            x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        axes = self.models[0].hook_dict[name].axes
        place = next((axes.index(axis) for axis in ("pos", "query") if axis in axes), None)
        self._gap(name, x, y, rows, place)

    def _gap(self, name: str, x: Tensor, y: Tensor, rows: Tensor, place: int | None) -> None:
        # Masked scores are -inf in both.
        gaps = (x - y).abs().where(x != y, 0.0).nan_to_num(nan=float("inf"))
        sizes = x.abs().where(x.isfinite(), 0.0)
        if place is None or gaps.shape[0] != len(rows):
            per_position = gaps.amax().expand(self.real[rows].shape)
            size = sizes.amax()
        else:
            others = [axis for axis in range(gaps.ndim) if axis not in (0, place)]
            per_position = gaps.amax(others) if others else gaps
            size = (sizes.amax(others) if others else sizes).where(self.real[rows], 0.0).amax()
        per_position = per_position.where(self.real[rows], 0.0)
        seen = self.seen.setdefault(name, _Seen())
        seen.absolute, seen.scale = max(seen.absolute, float(per_position.max())), max(seen.scale, float(size))
        seen.gaps.append((rows, per_position))

    def _see_outputs(self, one: Tensor, other: Tensor, rows: Tensor) -> None:
        self.kl[rows] = (one.exp() * (one - other).where(one > -torch.inf, 0.0)).sum(-1).clamp(min=0.0)
        self.kl[rows] = self.kl[rows].where(self.real[rows], float("nan"))
        self.agrees[rows] = one.argmax(-1) == other.argmax(-1)
        following = self.tokens[rows][:, 1:].cpu()
        both = self.real[rows][:, 1:] & self.real[rows][:, :-1]
        for losses, log_probs in zip(self.losses, (one, other), strict=True):
            found = -log_probs[:, :-1].gather(-1, following[..., None])[..., 0]
            losses[rows, 1:] = found.where(both, float("nan"))
        self._gap(_LOG_PROBS, one, other, rows, 1)

    def mean_kl(self) -> Tensor:
        """The mean of each prompt."""
        return self.kl.nanmean(-1)

    def loss(self, which: int) -> float:
        return float(self.losses[which].nanmean())

    def found(self) -> Iterator[SiteDifference]:
        """The sites, in the order in which the first model computes them; outputs last."""
        n_pos = self.tokens.shape[1]
        for name in [*(name for name in self.models[0].hook_dict if name in self.seen), _LOG_PROBS]:
            seen = self.seen[name]
            if seen.absolute != seen.absolute:
                empty = torch.full((n_pos,), float("nan"), dtype=torch.float64)
                yield SiteDifference(
                    name, seen.absolute, seen.absolute, "shapes" in self.notes[name], -1, -1, empty, self.notes[name]
                )
                continue
            gaps = torch.zeros(self.tokens.shape, dtype=torch.float64)
            for rows, one in seen.gaps:
                gaps[rows] = one
            relative = gaps / max(seen.scale, torch.finfo(torch.float64).tiny)
            beyond = (relative > self.tolerance).nonzero()
            prompt, pos = (int(one) for one in beyond[0]) if len(beyond) else (-1, -1)
            if pos >= 0:
                pos = int(self.real[prompt, : pos + 1].sum()) - 1
            yield SiteDifference(
                site=name,
                absolute=seen.absolute,
                relative=float(relative.max()),
                differs=bool(len(beyond)),
                prompt=prompt,
                pos=pos,
                by_position=relative.amax(0),
                note=self.notes.get(name, ""),
            )


# Sites that hold the stream or what is added to it, and those of its copies.
_WRITTEN = frozenset(
    {
        "hook_embed",
        "hook_pos_embed",
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_attn_out",
        "hook_mlp_out",
    }
    | {"hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"}
)
_OF_HEADS = frozenset({"hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k"})


def _comparable(name: str, a: HookedModel, b: HookedModel) -> str:
    """How a site of two models can be compared: `"same"`, `"centred"`, or why it cannot."""
    only_one = set(a.processed) ^ set(b.processed)
    point = name.rpartition(".")[2]
    if "refactor_factored_attn_matrices" in only_one and point in _OF_HEADS:
        return "heads have other bases since their matrices were refactored in one model"
    if "fold_value_biases" in only_one and point in ("hook_v", "hook_z", "hook_result"):
        return "value biases are in the values of one model, and in b_O of the other"
    if "fold_ln" in only_one and name == "unembed.hook_in":
        return "the final norm's gain is in the unembedding of one model"
    if only_one & {"fold_ln", "center_unembed"} and name == "unembed.hook_out":
        return "logits differ by a constant; see the log-probabilities"
    if "center_writing_weights" in only_one and point in _WRITTEN:
        return "centred"
    return "same"


def _effects(
    a: HookedModel,
    b: HookedModel,
    tokens: Tensor,
    mask: Tensor | None,
    metric: Metric,
    interventions: Sequence[Intervention] | None,
    verbose: bool,
) -> EffectDifferences:
    cfg = a.cfg
    shape: tuple[int, ...]
    if interventions is None:
        if (cfg.n_layers, cfg.n_heads) != (b.cfg.n_layers, b.cfg.n_heads):
            raise ValueError("the models have other numbers of heads: give the interventions whose effects to compare")
        places = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
        cells = [Intervention(get_act_name("z", layer), "zero", head=head) for layer, head in places]
        labels, shape = tuple(f"L{layer}H{head}" for layer, head in places), (cfg.n_layers, cfg.n_heads)
    else:
        cells, shape = list(interventions), (len(interventions),)
        labels = tuple(f"{one.operation} at {one.site}" for one in cells)
    changes = []
    for model in (a, b):
        place = next(iter(model.parameters())).device
        moved, real = tokens.to(place), None if mask is None else mask.to(place)
        with torch.no_grad():
            base = metric(cast(Tensor, model(moved, attention_mask=real)))
        scores = sweep(model, moved, cells, metric, attention_mask=real, verbose=verbose)
        changes.append((scores - base).double().cpu())
    return EffectDifferences(labels, changes[0], changes[1], shape)


def compare_checkpoints(
    checkpoints: Sequence[tuple[str, Checkpoint]], prompts: Prompts, **settings: object
) -> CheckpointComparison:
    """Return each of several checkpoints beside the last of them. Two models are in memory at a time.

    Args:
        checkpoints: (name, model) in their order; for a model, its folder, or a function that loads it.
        prompts: as for `compare`.
        settings: of `compare`.

    Raises:
        ValueError: fewer than two checkpoints, or as `compare`.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"two checkpoints or more are compared, got {len(checkpoints)}")
    last = _loaded(checkpoints[-1][1])
    found = []
    for index, (_, checkpoint) in enumerate(checkpoints):
        model = last if index == len(checkpoints) - 1 else _loaded(checkpoint)
        found.append(compare(model, last, prompts, **settings))  # type: ignore[arg-type]
    return CheckpointComparison(tuple(name for name, _ in checkpoints), tuple(found))


def _loaded(checkpoint: Checkpoint) -> HookedModel:
    if isinstance(checkpoint, (str, Path)):
        return HookedTransformer.from_pretrained(str(checkpoint))
    if isinstance(checkpoint, torch.nn.Module):
        return cast(HookedModel, checkpoint)
    return cast(Callable[[], HookedModel], checkpoint)()
