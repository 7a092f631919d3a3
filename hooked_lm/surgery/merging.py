"""merge_heads: a model in which one head stands for several, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import entries_of, integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.circuits.last_token import layer_index
from hooked_lm.components import Attention
from hooked_lm.interventions import Intervention
from hooked_lm.losses import lm_cross_entropy_loss
from hooked_lm.names import get_act_name
from hooked_lm.patching.sites import read_prompts
from hooked_lm.surgery.factoring import check_mergeable, merged_weights
from hooked_lm.surgery.result import Cost, HeadMerge, MergedGroup
from hooked_lm.tokenization import Prompts
from hooked_lm.transformer import HookedTransformer

__all__ = ["merge_heads"]


@torch.no_grad()
def merge_heads(
    model: HookedTransformer,
    layer: int,
    groups: Sequence[Sequence[int]],
    prompts: Prompts,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 32,
    verbose: bool = True,
) -> HeadMerge:
    """Return a new model in which one head of a layer stands for each group, with what that costs on prompts.

    Of each group one head keeps its queries and keys, and gets the group's OV circuits, added up and factored to rank
    `d_head`: see `factoring.merged_weights`. It is the head with whose pattern the group's summed output on the prompts
    is nearest to what it was. The other heads of the group stay in the model, since every layer has as many heads, and
    write nothing: their `W_O` is zero. Where the patterns of a group are equal and the summed circuits fit into one
    head, the new model computes the same.

    The cost of each group alone, and of all together, is the mean KL divergence from the old model's predictions to the
    new one's, and the loss. The control ablates the heads that the merge frees, in the old model: a merge that costs no
    less than that has done nothing.

    Args:
        model: a `HookedTransformer` of stock components, without hooks. It is left as it is.
        layer: the block; negative counts from the end.
        groups: of heads, such as `[[0, 3], [5, 6]]`: two or more in each, and no head twice. With grouped queries, the
            heads of a group share their keys and values.
        prompts: on which heads are compared and costs measured, as the model takes them.
        attention_mask: [batch pos], 0 at padding.
        batch_size: prompts that are run at a time.
        verbose: show a progress bar.

    Raises:
        ValueError: a layer or head that the model lacks, groups that overlap or are too small, heads that do not share
            keys and values, heads that cannot be merged (see `factoring.check_mergeable`), or hooks and components that
            the new model would lack (see `with_layers`).
    """
    if integer(batch_size, "batch_size") < 1:
        raise ValueError(f"batch_size is 1 or more, got {batch_size}")
    layer = layer_index(layer, model.cfg.n_layers)
    check_mergeable(model, layer)
    checked = _checked_groups(model, groups)
    tokens, mask = read_prompts(model, prompts, attention_mask)
    batches = [slice(first, first + batch_size) for first in range(0, len(tokens), batch_size)]
    made = model.with_layers(range(model.cfg.n_layers))
    errors = _pattern_errors(model, layer, checked, tokens, mask, batches)
    kept = [min(group, key=lambda head: errors[head]) for group in checked]
    freed = [tuple(one for one in group if one != head) for group, head in zip(checked, kept, strict=True)]
    attn = made.blocks[layer].attn
    alone = [merged_weights(attn, group, head) for group, head in zip(checked, kept, strict=True)]
    for group, head in zip(checked, kept, strict=True):
        _set(attn, merged_weights(attn, group, head)[0])
    together = {name: getattr(attn, name).clone() for name in alone[0][0]}
    predicts = model.cfg.attention_dir == "causal" and model.cfg.d_vocab_out == model.cfg.d_vocab
    before, after, ablated = (_Measured(predicts) for _ in range(3))
    # One group is all of them together.
    several = len(checked) > 1
    by_group = [(_Measured(predicts), _Measured(predicts)) if several else (after, ablated) for _ in checked]
    for rows in tqdm(batches, disable=not verbose, desc="batches", leave=False):
        part, part_mask = tokens[rows], mask[rows]
        base = at_least_single(model(part, attention_mask=part_mask))
        before.add(base, base, part, part_mask)
        after.add(base, made(part, attention_mask=part_mask), part, part_mask)
        every = tuple(head for heads in freed for head in heads)
        ablated.add(base, _without(model, layer, every, part, part_mask), part, part_mask)
        for (weights, _), heads, (merged, gone) in zip(alone, freed, by_group, strict=True):
            if several:
                _set(attn, weights)
                merged.add(base, made(part, attention_mask=part_mask), part, part_mask)
                gone.add(base, _without(model, layer, heads, part, part_mask), part, part_mask)
        _set(attn, together)
    found = tuple(
        MergedGroup(group, head, lost, errors[head], merged.cost(), gone.cost())
        for group, head, (_, lost), (merged, gone) in zip(checked, kept, alone, by_group, strict=True)
    )
    start, end, control = (one.cost() for one in (before, after, ablated))
    return HeadMerge(made, layer, found, start.loss, end, control, int(mask.sum()))


def _checked_groups(model: HookedTransformer, groups: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    cfg, found = model.cfg, list[tuple[int, ...]]()
    of_group = cfg.n_heads // cfg.n_kv_heads
    for group in groups:
        entries = entries_of(group)
        if entries is None or len(entries) < 2:
            raise ValueError(f"groups are lists of two heads or more, such as [[0, 3], [5, 6]]; got {groups!r}")
        heads = tuple(integer(one, "a head") for one in entries)
        wrong = [head for head in heads if not 0 <= head < cfg.n_heads]
        if wrong:
            raise ValueError(f"there is no head {wrong[0]}: a layer has heads 0-{cfg.n_heads - 1}")
        if of_group > 1 and len({head // of_group for head in heads}) > 1:
            raise ValueError(
                f"heads {', '.join(map(str, heads))} do not share their keys and values (grouped queries), and no head "
                f"can have values of its own: merge heads of one group, such as {list(range(of_group))}"
            )
        found.append(heads)
    every = [head for heads in found for head in heads]
    if not found or len(set(every)) < len(every):
        raise ValueError(f"give one group or more, and no head twice; got {groups!r}")
    return found


def _pattern_errors(
    model: HookedTransformer,
    layer: int,
    groups: Sequence[tuple[int, ...]],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    batches: Sequence[slice],
) -> dict[int, float]:
    """Return for each head how far the group's output moves if all of the group have that head's pattern.

    It is the mean squared distance of the group's summed outputs, as a share of their mean square.
    """
    sites = {name: get_act_name(name, layer) for name in ("pattern", "v", "z")}
    W_O = model.blocks[layer].attn.W_O.detach()
    moved = {head: 0.0 for heads in groups for head in heads}
    size = dict(moved)
    for rows in batches:
        _, cache = model.run_with_cache(
            tokens[rows],
            attention_mask=mask[rows],
            names_filter=list(sites.values()),
            stop_at_layer=model.cfg.stop_after(layer),
            return_type=None,
            return_cache_object=False,
        )
        pattern, v, z = (at_least_single(cache[sites[name]]) for name in ("pattern", "v", "z"))
        v = v.repeat_interleave(model.cfg.n_heads // v.shape[2], 2)
        counted = mask[rows].bool().to(z.device)
        for heads in groups:
            chosen = list(heads)
            matrices = W_O[chosen].to(z)
            written = einsum(z[:, :, chosen], matrices, "b q h d_head, h d_head d_model -> b q d_model")
            for head in heads:
                mixed = einsum(pattern[:, head], v[:, :, chosen], "b q k, b k h d_head -> b q h d_head")
                other = einsum(mixed, matrices, "b q h d_head, h d_head d_model -> b q d_model")
                moved[head] += float((other - written)[counted].square().sum(dtype=torch.float64))
                size[head] += float(written[counted].square().sum(dtype=torch.float64))
    return {head: moved[head] / size[head] if size[head] else 0.0 for head in moved}


def _set(attn: Attention, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        getattr(attn, name).copy_(value)


def _without(
    model: HookedTransformer, layer: int, heads: tuple[int, ...], tokens: Tensor, mask: Tensor
) -> Float[Tensor, "batch pos vocab"]:
    zero = Intervention(get_act_name("z", layer), "zero", head=heads)
    logits: Tensor = model.run(tokens, interventions=[zero], attention_mask=mask)
    return logits


class _Measured:
    """Sums over prompts of how a model's predictions differ from the old model's, and of its loss.

    Args:
        predicts: whether the model predicts its next token, so that there is a loss.
    """

    def __init__(self, predicts: bool) -> None:
        self.predicts = predicts
        self.divergence, self.loss, self.n_tokens, self.n_predictions = 0.0, 0.0, 0, 0

    def add(self, base: Tensor, logits: Tensor, tokens: Tensor, mask: Tensor) -> None:
        """Add a batch of prompts: the original model's logits, and those of the changed one."""
        logits, real = at_least_single(logits), mask.bool().to(base.device)
        old, new = base.log_softmax(-1), logits.log_softmax(-1)
        divergence = (old.exp() * (old - new)).sum(-1)[real]
        self.divergence += float(divergence.sum(dtype=torch.float64))
        self.n_tokens += int(real.sum())
        n_predictions = int((mask[:, 1:] * mask[:, :-1]).sum())
        if n_predictions and self.predicts:
            losses = lm_cross_entropy_loss(logits, tokens.to(logits.device), mask.to(logits.device), per_token=True)
            self.loss += float(losses.sum(dtype=torch.float64))
            self.n_predictions += n_predictions

    def cost(self) -> Cost:
        """Return the means."""
        loss = self.loss / self.n_predictions if self.n_predictions else None
        return Cost(self.divergence / self.n_tokens, loss)
