"""A case: a model, prompts and edits drawn from a seed, with the reference's activations beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hooked_lm.interventions import Intervention
from tests.fuzz.batch import Batch
from tests.fuzz.draw import draw_batch, draw_model
from tests.fuzz.edits import Passes, draw_edit, expected_rows
from tests.fuzz.reference import Reference

KEY_SITES = ("hook_attn_scores", "hook_pattern")


class Case:
    """One model, and what is drawn and computed of it.

    Args:
        seed: everything follows from it.
    """

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)
        # Sampling, and hooks that draw, are the seed's too.
        torch.manual_seed(self.rng.randrange(2**31))
        self.model = draw_model(self.rng)
        config = self.model.cfg.to_dict()
        weights = {name: value.clone().requires_grad_() for name, value in self.model.state_dict().items()}
        self.reference = Reference(config, weights)
        self.axes: Mapping[str, Sequence[str]] = {name: point.axes for name, point in self.model.hook_dict.items()}
        self.causal = self.model.cfg.attention_dir == "causal"
        self.d_vocab = self.model.cfg.d_vocab

    def batch(self, **options: float) -> Batch:
        return draw_batch(self.rng, self.d_vocab, **options)  # type: ignore[arg-type]

    def rng_tokens(self, shape: Sequence[int]) -> Tensor:
        return torch.tensor([[self.rng.randrange(self.d_vocab) for _ in range(shape[1])] for _ in range(shape[0])])

    def rows(
        self,
        batch: Batch,
        edits: Sequence[Intervention] = (),
        passes: Passes | None = None,
        *,
        head_copies: bool = True,
        graph: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Return the activations of each prompt, by the reference; with a graph if asked."""
        with torch.set_grad_enabled(graph):
            return expected_rows(self.reference, batch, edits, self.axes, passes, head_copies)

    def logits(self, batch: Batch, edits: Sequence[Intervention] = (), passes: Passes | None = None) -> Tensor:
        """Return the logits [batch pos vocab] by the reference; 0 at padding."""
        return self.together(batch, self.rows(batch, edits, passes), "unembed.hook_out")[0]

    def together(self, batch: Batch, rows: list[dict[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
        return batch.together([row[name] for row in rows], self.axes[name])

    def edits(
        self,
        batch: Batch,
        *,
        most: int = 3,
        from_end: bool = True,
        kept: Sequence[int] | None = None,
        allowed: Callable[[str], bool] = lambda name: True,
    ) -> list[Intervention]:
        """Draw edits of a batch.

        Args:
            batch: the prompts.
            most: at most so many.
            from_end: positions may be negative.
            kept: the positions that are unembedded; None for all.
            allowed: which sites.
        """
        shapes = self.rows(batch)[0]
        sites = [name for name in shapes if allowed(name) and self.may_edit(name, batch)]
        sizes = {"batch": len(batch.tokens), "pos": batch.length, "query": batch.length, "key": batch.length}
        drawn = []
        for _ in range(self.rng.randint(0, most) if sites else 0):
            site = self.rng.choice(sites)
            shape = [
                sizes.get(axis, size) for axis, size in zip(self.axes[site], (0, *shapes[site].shape), strict=True)
            ]
            positions = kept if site.startswith("unembed.") else None
            drawn.append(
                draw_edit(
                    self.rng,
                    site,
                    self.axes[site],
                    shape,
                    from_end=from_end,
                    positions=positions,
                    d_vocab=self.d_vocab,
                )
            )
        return drawn

    def may_edit(self, site: str, batch: Batch) -> bool:
        """Return whether a site is edited: not chosen experts, nor scores for keys that are padding."""
        return not site.endswith("hook_expert_indices") and not (batch.padded and site.endswith(KEY_SITES))

    def some_names(self, names: Sequence[str]) -> list[str]:
        return self.rng.sample(list(names), self.rng.randint(1, len(names)))


def assert_close(found: Tensor, expected: Tensor, what: str, real: Tensor | None = None) -> None:
    """Compare at the entries of real tokens; the tolerance is that of angles in float32."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if real is not None:
        found, expected = torch.where(real, found, 0), torch.where(real, expected, 0)
    finite = expected.isfinite()
    largest = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    torch.testing.assert_close(
        found.to(expected),
        expected,
        rtol=0,
        atol=1e-6 * max(1.0, largest),
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )
