"""Causal tracing: add noise to the subject, restore one hidden state, and measure how much of the answer is restored.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1. Three kinds of run: the clean one;
the corrupted one, with noise on the embeddings of the subject's tokens; and the corrupted one in which one hidden
state, or one in each of several neighbouring layers, has its value of the clean run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention
from hooked_lm.metrics import Metric
from hooked_lm.patching.patches import Patch, patch_sites
from hooked_lm.patching.setters import layer_pos_patch_setter
from hooked_lm.patching.sites import axes_at, clean_activations, read_prompts
from hooked_lm.sweep import AnyMetric, sweep
from hooked_lm.sweep.options import DEFAULT_MEMORY_BUDGET
from hooked_lm.tokenization import Prompts

__all__ = ["CausalTrace", "causal_trace"]

_EMBEDDINGS = "hook_embed"


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """The metric with each state restored.

    The prompt axis has length 1 where the metric is a plain function, which scores all prompts together.

    Attributes:
        site: short name of the restored state.
        window: how many layers were restored together.
        noise: standard deviation of the noise.
        clean: the metric without noise, [prompt].
        corrupted: the metric with noise, [sample prompt].
        restored: the metric with noise and the state restored, [layer pos sample prompt].
    """

    site: str
    window: int
    noise: float
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, "sample prompt"]
    restored: Float[Tensor, "layer pos sample prompt"]

    @property
    def total_effect(self) -> Float[Tensor, ""]:
        """The effect of the noise: clean less corrupted, averaged over samples and prompts."""
        return self.clean.mean() - self.corrupted.mean()

    @property
    def indirect_effect(self) -> Float[Tensor, "layer pos"]:
        """The effect of restoring a state: restored less corrupted, averaged over samples and prompts."""
        return (self.restored - self.corrupted).mean((-2, -1))

    @property
    def per_prompt(self) -> Float[Tensor, "layer pos prompt"]:
        """The indirect effect of each prompt, averaged over samples."""
        return (self.restored - self.corrupted).mean(-2)

    def __repr__(self) -> str:
        layers, positions, samples, prompts = self.restored.shape
        return (
            f"CausalTrace({self.site!r}, window {self.window}, {layers} layers, {positions} positions, "
            f"{samples} samples of {prompts} prompts, total effect {float(self.total_effect):.4g})"
        )


@torch.no_grad()
def causal_trace(
    model: HookedModel,
    tokens: Prompts,
    subject: Sequence[int] | Sequence[Sequence[int]],
    metric: AnyMetric,
    *,
    site: str = "resid_post",
    window: int = 1,
    noise: float | None = None,
    n_samples: int = 10,
    seed: int = 0,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    verbose: bool = True,
) -> CausalTrace:
    """Return the metric with noise on the subject and the state at each layer and position restored.

    Args:
        model: a `HookedTransformer`.
        tokens: the prompts, as the model takes them.
        subject: positions of the subject's tokens, the same in all prompts, or a list of them for each.
        metric: one of `hooked_lm.metrics`, such as `log_prob(answer)`, or a function from logits [batch pos vocab] to a
            scalar. The paper uses the answer's probability.
        site: short name of the state that is restored: `"resid_post"` (the paper's hidden state), `"mlp_out"`,
            `"attn_out"`, or another with axes [batch pos ...].
        window: restore so many neighbouring layers together, those from `layer - window // 2` on; fewer at the ends.
            The paper takes 10 for MLPs and attention.
        noise: standard deviation of the normal noise; None for the paper's 3 times that of the embeddings, measured
            over all entries of the subjects' embeddings.
        n_samples: number of draws of the noise.
        seed: for the noise. Draws do not depend on the device.
        attention_mask: [batch pos], 0 at padding.
        memory_budget, verbose: as for `sweep`.

    Raises:
        UnknownHookError: the model has no such site.
        ValueError: a position that is not in the prompt, a window, noise or number of samples out of range, or a metric
            that is no number.
    """
    tokens, mask = read_prompts(model, tokens, attention_mask)
    sites = patch_sites(model, Patch(site, ("layer", "pos")))
    for name in sites:
        layer_pos_patch_setter.check(name, axes_at(model, name))
    where = _subject_mask(subject, tokens, mask)
    _check_settings(window, noise, n_samples, len(sites))
    clean = clean_activations(model, tokens, [*sites, _EMBEDDINGS], tokens, mask, mask)
    embeddings = clean[_EMBEDDINGS]
    scale = 3 * float(embeddings[where].double().std()) if noise is None else float(noise)
    per_prompt = isinstance(metric, Metric)
    unchanged = sweep(model, tokens, [()], metric, attention_mask=mask, per_prompt=per_prompt, verbose=False)
    cells = [(), *_restorations(sites, clean, window, tokens.shape[1])]
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n_samples):
        drawn = torch.randn(embeddings.shape, generator=generator).to(embeddings) * scale * where[..., None]
        scores = sweep(
            model,
            tokens,
            cells,
            metric,
            always=[Intervention(_EMBEDDINGS, "add", drawn)],
            attention_mask=mask,
            per_prompt=per_prompt,
            memory_budget=memory_budget,
            verbose=verbose,
        )
        samples.append(scores.reshape(len(cells), -1))
    scored = torch.stack(samples, 1)  # [cell sample prompt]
    restored = scored[1:].reshape(len(sites), tokens.shape[1], *scored.shape[1:])
    return CausalTrace(site, window, scale, unchanged.reshape(-1), scored[0], restored)


def _restorations(
    sites: Sequence[str], clean: dict[str, Tensor], window: int, n_positions: int
) -> list[tuple[Intervention, ...]]:
    """The cells [layer pos]: each puts back the clean states of a window of layers at one position."""
    cells = []
    for layer in range(len(sites)):
        first = layer - window // 2
        layers = range(max(first, 0), min(first + window, len(sites)))
        for pos in range(n_positions):
            cells.append(
                tuple(Intervention(sites[one], "replace", clean[sites[one]][:, pos], pos=pos) for one in layers)
            )
    return cells


def _subject_mask(
    subject: Sequence[int] | Sequence[Sequence[int]], tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Tensor:
    """Which tokens are the subject's, as booleans [batch pos]."""
    batch, n_positions = tokens.shape
    given = list(subject)
    rows = [given] * batch if all(isinstance(one, int) for one in given) else given
    if len(rows) != batch:
        raise ValueError(f"there are positions of {len(rows)} subjects, and {batch} prompts")
    where = torch.zeros(batch, n_positions, dtype=torch.bool, device=tokens.device)
    for prompt, row in enumerate(rows):
        positions = list(row) if isinstance(row, Sequence) else []
        if not positions or not all(isinstance(pos, int) and not isinstance(pos, bool) for pos in positions):
            raise ValueError(f"the subject of prompt {prompt} is a list of one or more positions, got {row!r}")
        for pos in positions:
            if not -n_positions <= pos < n_positions:
                raise ValueError(f"the subject of prompt {prompt} has position {pos}; there are {n_positions}")
            if not mask[prompt, pos]:
                raise ValueError(f"position {pos}, of the subject of prompt {prompt}, is padding")
            where[prompt, pos] = True
    return where


def _check_settings(window: int, noise: float | None, n_samples: int, n_layers: int) -> None:
    if not 1 <= window <= n_layers:
        raise ValueError(f"a window is of 1-{n_layers} layers, got {window}")
    if noise is not None and not 0 < noise < float("inf"):
        raise ValueError(f"noise is a standard deviation above 0, got {noise}")
    if n_samples < 1:
        raise ValueError(f"n_samples is 1 or more, got {n_samples}")
