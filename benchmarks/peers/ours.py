"""Our own contestant: the classic tasks, and what only this library does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.classic import Classic
from benchmarks.peers.contestant import Task, Tokens, serve_contestant, undisturbed
from hooked_lm import HookedTransformer, patching
from hooked_lm.metrics import logit_diff
from hooked_lm.names import get_act_name
from hooked_lm.patching import PATCHES, PatchSetter

Index = Sequence[int]


class Ours(Classic):
    """A model of this library and a pair of prompts."""

    libraries = ("hooked-lm",)
    ways = ("unprocessed", "processed")

    def __init__(self) -> None:
        super().__init__()
        self._corrupted = torch.zeros(1, 0, dtype=torch.long)
        self._clean_cache: Any = None

    def load_model(self, folder: Path, way: str) -> HookedTransformer:
        load = HookedTransformer.from_pretrained
        if way == "unprocessed":
            load = HookedTransformer.from_pretrained_no_processing
        return load(str(folder / "huggingface")).eval()

    def tasks(self) -> Mapping[str, Callable[..., Task]]:
        own: dict[str, Callable[..., Task]] = {
            "lazy_cache": partial(self.full_cache, lazy=True),
            "eager_forward": self.eager_forward,
            "traced_forward": self.traced_forward,
            "traced_grid": self.traced_grid,
            "swept_grid": self.swept_grid,
        }
        return {**super().tasks(), **own}

    def full_cache(self, tokens: Tokens, layer: int, **options: Any) -> Task:
        """As everywhere; but a cache knows its bytes, and a lazy one would compute what others hold."""
        task = super().full_cache(tokens, layer, **options)
        return Task(task.run, task.values, held=lambda result: result[1].nbytes)

    def eager_forward(self, tokens: Tokens) -> Task:
        """A forward pass that keeps nothing, with attention in its parts: an idle hook sees every pattern."""
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(self.model.cfg.n_layers)]
        prompt = torch.tensor(tokens)
        hooks = [(name, lambda pattern, hook: None) for name in names]
        return Task(lambda: self.model.run_with_hooks(prompt, fwd_hooks=hooks), lambda logits: {"logits": logits})

    # Traces, beside what they are made of

    def traced_forward(self, tokens: Tokens) -> Task:
        """A trace that reads the logits, recorded and run."""
        prompt = torch.tensor(tokens)

        def run() -> Tensor:
            with self.model.trace() as t:
                logits = t.prompts(prompt).logits.save()
            return logits.value

        return Task(run, lambda logits: {"logits": logits})

    def traced_grid(self, clean: Tokens, corrupted: Tokens, answer: int, wrong: int) -> Task:
        """The grid of the stream before each layer at each position, written as loops in one trace."""
        prompts, patched, metric = torch.tensor(clean), torch.tensor(corrupted), logit_diff(answer, wrong)

        def run() -> Tensor:
            with self.model.trace() as t:
                source, cells = t.prompts(prompts), []
                for layer in range(self.model.cfg.n_layers):
                    for pos in range(prompts.shape[1]):
                        cell = t.prompts(patched)
                        cell["resid_pre", layer].at(pos=pos).replace(source["resid_pre", layer].at(pos=pos))
                        cells.append(cell.metric(metric).mean())
                grid = t.stack(cells).save()
            return grid.value

        return Task(run, lambda grid: {"grid": grid})

    def swept_grid(self, clean: Tokens, corrupted: Tokens, answer: int, wrong: int) -> Task:
        """The same grid by its function, the run of the clean prompts included."""
        prompts, patched, metric = torch.tensor(clean), torch.tensor(corrupted), logit_diff(answer, wrong)
        return Task(
            lambda: patching.get_act_patch_resid_pre(self.model, patched, prompts, metric, verbose=False),
            lambda grid: {"grid": grid.flatten()},
        )

    # Patching: cell by cell, as one does without a sweep, and whole grids

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        return {"set_prompts": self.set_prompts, "patch": self.patch, "sweep": self.sweep}

    @torch.inference_mode()
    def set_prompts(self, clean: Tokens, corrupted: Tokens) -> None:
        """Run the clean prompts [batch pos] and keep all their activations."""
        self._corrupted = torch.tensor(corrupted)
        _, self._clean_cache = self.model.run_with_cache(torch.tensor(clean))

    @torch.inference_mode()
    def patch(
        self, activation: str, setter: str, axes: Sequence[str], cells: Sequence[Index], answer: int, wrong: int
    ) -> dict[str, Any]:
        """Return the seconds that some cells of a grid take in a plain loop, and their values."""
        found = {(one.activation, one.setter.name, tuple(one.axes)): one.setter for one in PATCHES.values()}
        run = partial(
            patch_in_turn,
            self.model,
            self._corrupted,
            self._clean_cache,
            activation,
            found[activation, setter, tuple(axes)],
            logit_diff(answer, wrong),
            cells,
        )
        with undisturbed():
            start = perf_counter()
            values = run()
            seconds = perf_counter() - start
        return {"seconds": seconds, "values": values}

    @torch.inference_mode()
    def sweep(self, patch: str, answer: int, wrong: int, function: bool = False) -> dict[str, Any]:
        """Return the seconds that a whole grid takes, and the value of every cell.

        Args:
            patch: the grid.
            answer, wrong: the tokens whose logits are compared.
            function: give the metric as a function of one's own.
        """
        grid = getattr(patching, f"get_act_patch_{patch}")
        metric: Any = logit_diff(answer, wrong)
        if function:
            metric = lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]  # noqa: E731 - as people write it
        with undisturbed():
            start = perf_counter()
            values = grid(self.model, self._corrupted, self._clean_cache, metric, verbose=False)
            seconds = perf_counter() - start
        return {"seconds": seconds, "values": values.flatten().tolist()}


def patch_in_turn(
    model: HookedTransformer,
    corrupted: Tensor,
    clean_cache: Mapping[Any, Tensor],
    activation: str,
    setter: PatchSetter,
    metric: Callable[[Tensor], Any],
    cells: Sequence[Index],
) -> list[float]:
    """Return the values of some cells of a grid, each from a hooked run of its own."""
    values = []
    for index in cells:
        site = get_act_name(activation, index[0])

        def put_clean(x: Tensor, hook: Any, site: str = site, index: Index = index) -> Tensor:
            return setter(x, index, clean_cache[site])

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(site, put_clean)])
        values.append(metric(logits).item())
    return values


if __name__ == "__main__":
    serve_contestant(Ours())
