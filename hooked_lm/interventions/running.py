"""Intervening: the model's methods that run it under interventions."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookedRootModule, HookPoint, KeptPositions, ModelOutput, Pass, current_pass
from hooked_lm.interventions.intervention import Intervention
from hooked_lm.names import selected_axis

__all__ = ["Intervening", "InterventionHook"]


class InterventionHook:
    """An intervention as a hook. It returns a new tensor and never writes to its argument.

    Attributes:
        acted: the positions at which it has acted, as indices into `pos`.
    """

    edits_in_place = False

    def __init__(self, intervention: Intervention) -> None:
        self.intervention = intervention
        self.acted: set[int] = set()

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        running = current_pass()
        if running.first_read is not None and self._depends_on_pass(hook.axes):
            return self._in_segments(x, hook.axes, running)
        edited, here = self.intervention.apply(x, hook.axes, running.n_past, running.kept)
        self.acted.update(here)
        return edited

    def _depends_on_pass(self, axes: Sequence[str]) -> bool:
        """Return whether the edit of a text depends on the passes in which it is read.

        A negative position counts from the end of a pass, and its scores and patterns have the keys up to its end.
        """
        pos = self.intervention.pos
        counted_from_end = any(one < 0 for one in (pos if isinstance(pos, tuple) else (pos or 0,)))
        return "key" in axes or counted_from_end

    def _in_segments(self, x: Tensor, axes: Sequence[str], running: Pass) -> Tensor:
        """Return the activation of a text that is read again, edited as in the passes that read it before."""
        positions, keys = selected_axis(axes, "pos"), axes.index("key") if "key" in axes else None
        assert positions is not None
        kept = running.kept
        n_positions = x.shape[positions] if kept is None else kept.n_positions
        places = torch.arange(n_positions) if kept is None else torch.tensor(kept.positions)
        edited = x.clone()
        for start, stop in running.segments(n_positions):
            chosen = ((places >= start) & (places < stop)).nonzero()[:, 0]
            if not len(chosen):
                continue
            part = x.index_select(positions, chosen.to(x.device))
            if keys is not None:
                part = part.narrow(keys, 0, stop)
            there = None if kept is None else KeptPositions(tuple((places[chosen] - start).tolist()), stop - start)
            part, here = self.intervention.apply(part, axes, start, there)
            self.acted.update(here)
            target = edited if keys is None else edited.narrow(keys, 0, stop)
            target.index_copy_(positions, chosen.to(x.device), part)
        return edited

    def idle_positions(self) -> list[int | None]:
        """Return the positions at which it has not acted; [None] if it acts at all positions and never ran."""
        pos = self.intervention.pos
        wanted: tuple[int | None, ...] = pos if isinstance(pos, tuple) else (pos,)
        return [one for index, one in enumerate(wanted) if index not in self.acted]


class Intervening(HookedRootModule):
    """The intervening methods of `HookedTransformer`."""

    cfg: HookedTransformerConfig

    @contextmanager
    def intervening(self, interventions: Sequence[Intervention]) -> Generator[Self, None, None]:
        """Make the interventions in every pass within a `with` block, in the order given.

        Args:
            interventions: the edits.

        Raises:
            UnknownHookError: a site that the model does not have.
            ValueError: a position, head or feature that is out of range. Nothing has been added then.
        """
        with self.hooks(fwd_hooks=self.as_hooks(interventions)):
            yield self

    def as_hooks(self, interventions: Sequence[Intervention]) -> list[tuple[str, InterventionHook]]:
        """Return the interventions as plain hooks, `(name, function)`, for `fwd_hooks=` of `run_with_hooks` or `hooks`.

        Args:
            interventions: the edits.

        Raises:
            UnknownHookError: a site that the model does not have.
            ValueError: a position, head or feature that is out of range.
        """
        if isinstance(interventions, Intervention):
            raise TypeError("interventions is a list, got a single Intervention: put it into a list")
        axes = {name: point.axes for name, point in self.hook_dict.items()}
        for intervention in interventions:
            if not isinstance(intervention, Intervention):
                raise TypeError(f"an intervention is an Intervention, got {intervention!r}")
            intervention.check(self.cfg, axes)
        return [(one.site, InterventionHook(one)) for one in interventions]

    def run(self, *args: object, interventions: Sequence[Intervention] = (), **kwargs: object) -> ModelOutput:
        """Run the model once under interventions and return its output.

        Args:
            *args, **kwargs: go to the model.
            interventions: the edits.

        Raises:
            RuntimeError: after the run, if an intervention did not act: its site or a position was not in the run.
        """
        with self._all_acting(interventions):
            return self(*args, **kwargs)

    @contextmanager
    def _all_acting(self, interventions: Sequence[Intervention]) -> Generator[None, None, None]:
        """Do as `intervening` does, and raise at the end if an intervention never acted."""
        hooks = self.as_hooks(interventions)
        with self.hooks(fwd_hooks=hooks):
            yield
        for _, one in hooks:
            idle = one.idle_positions()
            if idle:
                where = "" if idle == [None] else f" at positions {idle}"
                raise RuntimeError(
                    f"this never acted{where}: {one.intervention}. The run did not include that site or those positions"
                )
