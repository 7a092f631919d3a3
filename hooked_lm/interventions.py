"""Interventions as data: at a site, on chosen positions, heads, features and prompts, replace, add, scale or zero.

The same object acts on a forward pass and on every step of a generation. It can be checked before anything runs, since
it says what it will touch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.names import UnknownHookError, describe_unknown

Operation = Literal["replace", "add", "scale", "zero"]
# Which entries along an axis: None for all, one (the axis is then dropped from the value's shape), or several.
Selection = int | tuple[int, ...] | None

OPERATIONS = ("replace", "add", "scale", "zero")
# The axis each selection is along, by the names a site may give it.
_AXIS_OF = {
    "batch": ("batch",),
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
    "feature": ("d_model", "d_head", "d_mlp", "vocab", "key", "expert"),
}

_PLURAL = {"pos": "positions", "head": "heads", "feature": "features", "batch": "prompts"}

_COUNTED = {"batch": "in the batch", "pos": "positions", "query": "positions", "key": "positions"}


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of one activation.

    Attributes:
        site: full hook name, `"blocks.3.attn.hook_z"`.
        operation: `"replace"` by the value, `"add"` it, `"scale"` by it, or `"zero"`.
        value: a number, or a tensor that broadcasts to what is selected; none for `"zero"`.
        pos: positions. From 0 they are those of the whole text, also when a generation reads it in steps; negative ones
            count from the end of what is being read, so that -1 is the newest position at every step. For scores and
            patterns they are query positions.
        head, feature, batch: heads, entries of the last axis, prompts.

    Raises:
        ValueError: an unknown operation, a value where none belongs or none where one does, or an empty selection.

    >>> Intervention("blocks.0.attn.hook_z", "zero", head=2)
    Intervention(site='blocks.0.attn.hook_z', operation='zero', value=None, pos=None, head=2, feature=None, batch=None)
    """

    site: str
    operation: Operation
    value: Tensor | float | None = None
    pos: Selection = None
    head: Selection = None
    feature: Selection = None
    batch: Selection = None

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} is none of {OPERATIONS}")
        if (self.operation == "zero") != (self.value is None):
            needs = "takes no value" if self.operation == "zero" else "needs a value"
            raise ValueError(f"{self.operation!r} at {self.site!r} {needs}")
        for name, selection in self.selections().items():
            several = selection if isinstance(selection, tuple) else (selection,)
            if not several or any(isinstance(one, bool) or not isinstance(one, int) for one in several):
                raise ValueError(f"{name}={selection!r} at {self.site!r} is not an int or a tuple of ints")

    def selections(self) -> dict[str, int | tuple[int, ...]]:
        """Return the selections that were made, by the name of their field."""
        made = {"pos": self.pos, "head": self.head, "feature": self.feature, "batch": self.batch}
        return {name: selection for name, selection in made.items() if selection is not None}

    def check(self, cfg: HookedTransformerConfig, axes_by_site: Mapping[str, str | None]) -> None:
        """Check the intervention against a model.

        Args:
            cfg: the model's config.
            axes_by_site: its hook names -> the axes of their activations.

        Raises:
            UnknownHookError: the model has no such site.
            ValueError: the site has no such axis, or no such entry along it.
        """
        if self.site not in axes_by_site:
            raise UnknownHookError(describe_unknown(self.site, list(axes_by_site)))
        axes = (axes_by_site[self.site] or "").split()
        for name, selection in self.selections().items():
            axis = axes[self._axis(name, axes)]
            size = _fixed_size(cfg, self.site, axis)
            for one in selection if isinstance(selection, tuple) else (selection,):
                if size is not None and not -size <= one < size:
                    raise ValueError(
                        f"{self.operation} at {self.site!r} {name} {one}: "
                        f"this model has {_PLURAL[name]} 0-{size - 1} there"
                    )

    def check_fit(
        self, cfg: HookedTransformerConfig, axes_by_site: Mapping[str, str | None], batch: int, n_positions: int
    ) -> None:
        """Check the intervention, which `check` has passed, against prompts that are read in one pass.

        Args:
            cfg: the model's config.
            axes_by_site: its hook names -> the axes of their activations.
            batch: the number of prompts.
            n_positions: their length.

        Raises:
            ValueError: a prompt, position or key that they lack, or a value that does not fit what is selected.
        """
        axes = (axes_by_site[self.site] or "").split()
        lengths = {"batch": batch, "pos": n_positions, "query": n_positions, "key": n_positions, "1": 1}
        sizes = [lengths.get(axis) or _fixed_size(cfg, self.site, axis) for axis in axes]
        shape: list[int | None] = list(sizes)
        for name, selection in self.selections().items():
            axis = self._axis(name, axes)
            size = sizes[axis]
            for one in selection if isinstance(selection, tuple) else (selection,):
                if size is not None and not -size <= one < size:
                    there = f"the prompts have {size} {_COUNTED[axes[axis]]}"
                    raise ValueError(f"{self.operation} at {self.site!r} {name} {one}: {there}")
            shape[axis] = len(selection) if isinstance(selection, tuple) else -1
        selected = [size for size in shape if size != -1]
        if not isinstance(self.value, Tensor) or None in selected:
            return
        try:
            torch.empty(self.value.shape, device="meta").expand(selected)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise ValueError(
                f"{self.operation} at {self.site!r}: a value with shape {tuple(self.value.shape)} does not fit what is "
                f"selected, {tuple(selected)}"
            ) from error

    def _axis(self, name: str, axes: Sequence[str]) -> int:
        found = [index for index, axis in enumerate(axes) if axis in _AXIS_OF[name]]
        if not found or (name == "feature" and found[-1] != len(axes) - 1):
            raise ValueError(f"{self.site!r} has axes {' '.join(axes)!r}: there is no {name} to select")
        return found[-1]

    def apply(self, x: Tensor, axes: Sequence[str], n_past: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        """Return an activation with the edit made, and which of the selected positions it was made at.

        Args:
            x: the activation; it comes back itself if none of the positions is in it.
            axes: the names of its axes.
            n_past: positions of the text that were read in earlier passes.

        Returns:
            The activation, and indices into `pos` as a tuple: those of positions that are part of this pass. Without
            `pos` it is (0,).

        Raises:
            ValueError: a prompt that is not there, or a value that does not broadcast to what is selected.
        """
        indices = [torch.arange(size, device=x.device) for size in x.shape]
        dropped: list[int] = []
        here: tuple[int, ...] = (0,)
        pos_axis: int | None = None
        for name, selection in self.selections().items():
            axis = self._axis(name, axes)
            chosen = selection if isinstance(selection, tuple) else (selection,)
            if name == "pos":
                local = [one + x.shape[axis] if one < 0 else one - n_past for one in chosen]
                here = tuple(index for index, one in enumerate(local) if 0 <= one < x.shape[axis])
                chosen, pos_axis = tuple(local[index] for index in here), axis
                if not here:
                    return x, here
            elif not all(-x.shape[axis] <= one < x.shape[axis] for one in chosen):
                raise ValueError(f"{self.site!r} has shape {tuple(x.shape)}: there is no {name} {selection}")
            indices[axis] = indices[axis][list(chosen)]
            if not isinstance(selection, tuple):
                dropped.append(axis)
        mesh = torch.meshgrid(*indices, indexing="ij")
        edited = x.clone()
        edited[mesh] = self._edit(x[mesh], dropped, pos_axis, here)
        return edited, here

    def _edit(self, selected: Tensor, dropped: Sequence[int], pos_axis: int | None, here: tuple[int, ...]) -> Tensor:
        if self.operation == "zero":
            return torch.zeros_like(selected)
        value = torch.as_tensor(self.value, dtype=selected.dtype, device=selected.device)
        # The value is as long as the whole selection, of which a pass may hold only some positions.
        whole = list(selected.shape)
        if pos_axis is not None and isinstance(self.pos, tuple):
            whole[pos_axis] = len(self.pos)
        shape = [size for axis, size in enumerate(whole) if axis not in dropped]
        try:
            value = value.expand(shape).reshape(whole)
        except RuntimeError as error:
            raise ValueError(
                f"{self.operation} at {self.site!r}: a value with shape {tuple(value.shape)} does not fit what is "
                f"selected, {tuple(shape)}"
            ) from error
        if pos_axis is not None and isinstance(self.pos, tuple):
            value = value.index_select(pos_axis, torch.tensor(here, device=value.device))
        if self.operation == "add":
            return selected + value
        return selected * value if self.operation == "scale" else value


def _fixed_size(cfg: HookedTransformerConfig, site: str, axis: str) -> int | None:
    """The length of an axis, where the architecture fixes it."""
    return {
        "head": cfg.n_heads,
        "kv_head": cfg.n_kv_heads,
        "d_model": cfg.d_model,
        "d_head": cfg.d_head,
        "d_mlp": cfg.d_shared_expert if ".mlp.shared." in site else cfg.d_mlp,
        "vocab": cfg.d_vocab_out,
        "expert": cfg.num_experts,
        "chosen": cfg.experts_per_token,
        "pos": cfg.n_ctx,
        "query": cfg.n_ctx,
    }.get(axis)
