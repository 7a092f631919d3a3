"""Activations of chosen tokens of many prompts, at one site of every layer: what probes are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_lm._support.integers import is_integer
from hooked_lm.circuits.last_token import LastTokenPrompts, chosen_layers
from hooked_lm.hooked_model import HookedModel
from hooked_lm.patching.patches import Patch, patch_sites
from hooked_lm.probing.division import listed
from hooked_lm.tokenization import Prompts

__all__ = ["Positions", "TokensAt", "activations_at"]

# Of every prompt: one position for all of them, or for each prompt one or several.
Positions = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class TokensAt:
    """Chosen tokens of prompts, each an example; in the order of the prompts.

    Attributes:
        prompts: padded on the left.
        rows: the prompt of each example, [example].
        columns: its position in the padded tokens, [example].
    """

    prompts: LastTokenPrompts
    rows: Int[Tensor, " example"]
    columns: Int[Tensor, " example"]

    @classmethod
    def of(
        cls, model: HookedModel, prompts: Prompts, pos: Positions = -1, attention_mask: Tensor | None = None
    ) -> TokensAt:
        """Find the tokens at given positions.

        Args:
            model: a `HookedTransformer`.
            prompts: strings of any lengths, or tokens [batch pos].
            pos: a position in every prompt, or for each prompt a position or a list of them. They count from each
                prompt's own first token, BOS included, and negative ones from its last; padding does not count.
            attention_mask: [batch pos], 0 at padding, for tokens.

        Raises:
            ValueError: a position that its prompt lacks or that comes twice, positions for another number of prompts,
                no position at all, or prompts as `LastTokenPrompts.of` refuses them.
        """
        read = LastTokenPrompts.of(model, prompts, attention_mask)
        lengths, width = read.mask.sum(1).tolist(), read.tokens.shape[1]
        rows, columns = [], []
        for row, (length, wanted) in enumerate(zip(lengths, _by_prompt(pos, len(read)), strict=True)):
            for one in wanted:
                if not -length <= one < length:
                    raise ValueError(
                        f"prompt {row} has {length} tokens, positions 0-{length - 1} or -{length} to -1; got pos {one}"
                    )
            places = [width - length + one % length for one in wanted]
            if len(set(places)) < len(places):
                raise ValueError(f"prompt {row} has a position twice in {list(wanted)}")
            rows += [row] * len(places)
            columns += places
        if not rows:
            raise ValueError("there are no positions to read: pos has none for any prompt")
        return cls(read, torch.tensor(rows), torch.tensor(columns))

    @property
    def tokens(self) -> Int[Tensor, " example"]:
        """The token of each example."""
        tokens = self.prompts.tokens.cpu()
        return tokens[self.rows, self.columns]

    @property
    def same_prompt(self) -> list[tuple[int, ...]]:
        """What the examples of equal prompts share and no others: the tokens of the prompt."""
        tokens, mask = self.prompts.tokens.cpu(), self.prompts.mask.cpu().bool()
        texts = [tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
        return [texts[row] for row in self.rows.tolist()]

    def __len__(self) -> int:
        return len(self.rows)


def _by_prompt(pos: Positions, n_prompts: int) -> list[tuple[int, ...]]:
    if is_integer(pos):
        return [(int(pos),)] * n_prompts  # type: ignore[arg-type]
    given = listed(pos)  # type: ignore[arg-type]
    several = [tuple(one) if isinstance(one, (list, tuple, range)) else (one,) for one in given]
    if len(several) != n_prompts or not all(is_integer(one) for entry in several for one in entry):
        raise ValueError(
            f"pos is an integer, or an integer or a list of them for each of the {n_prompts} prompts; got {pos!r}"
        )
    return [tuple(int(one) for one in entry) for entry in several]


@torch.no_grad()
def activations_at(
    model: HookedModel,
    tokens: TokensAt,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    verbose: bool = True,
) -> Float[Tensor, "layer example width"]:
    """Return the activations of chosen tokens at one site of every layer, in one pass for each batch of prompts.

    No layer after the last that is read is run. Of each batch the positions that are asked for are kept, and axes after
    the position (heads and their entries) become one. Hooks and interventions that are in place act.

    Args:
        model: a `HookedTransformer`.
        tokens: of which prompts and positions.
        site: a short name, `"resid_post"`, `"attn_out"`, `"z"`, `"post"`; or a hook name with `{layer}` in it.
        layers: the blocks to read; by default all.
        batch_size: prompts that are run at a time.
        device: where the activations are kept.
        verbose: show a progress bar.

    Raises:
        UnknownHookError: a layer has no such hook.
        ValueError: a site without one activation for each position, a layer that the model lacks, or sites of different
            widths.
    """
    patch, chosen = Patch(site, ("layer", "pos")), chosen_layers(model, layers)
    patch_sites(model, patch)
    names = [patch.site(layer) for layer in chosen]
    axes = model.hook_dict[names[0]].axes
    if tuple(axes[:2]) != ("batch", "pos"):
        raise ValueError(f"{names[0]!r} has axes {' '.join(axes)!r}: a probe reads sites [batch pos ...]")
    prompts, kept = tokens.prompts, []
    for batch in tqdm(list(prompts.batches(batch_size)), disable=not verbose, desc="activations", leave=False):
        there = (tokens.rows >= batch.start) & (tokens.rows < batch.stop)
        if not there.any():
            continue
        # Columns before the longest prompt of the batch are padding in all of its prompts.
        mask = prompts.mask[batch]
        start = int(mask.argmax(1).min())
        columns, place = (tokens.columns[there] - start).unique(return_inverse=True)
        _, cache = model.run_with_cache(
            prompts.tokens[batch, start:],
            attention_mask=mask[:, start:],
            names_filter=names,
            pos_slice=columns.to(prompts.tokens.device),
            stop_at_layer=model.cfg.stop_after(max(chosen)),
            return_cache_object=False,
        )
        rows = tokens.rows[there] - batch.start
        read = [cache[name] for name in names]
        picked = [one[rows.to(one.device), place.to(one.device)].flatten(1).to(device) for one in read]
        kept.append(_stacked(picked, site))
    return torch.cat(kept, 1)


def _stacked(activations: Sequence[Float[Tensor, "example _"]], site: str) -> Float[Tensor, "layer example width"]:
    widths = sorted({one.shape[1] for one in activations})
    if len(widths) > 1 or not activations[0].is_floating_point():
        raise ValueError(
            f"{site!r} is {activations[0].dtype} with widths {widths}: a probe reads numbers, as many in every layer"
        )
    return torch.stack(list(activations))
