"""What both versions of `transformer_lens` share: the classic tasks, and patching as in their tutorials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas
import torch
from torch import Tensor
from transformer_lens import patching  # type: ignore[import-not-found]
from transformers import AutoTokenizer

from benchmarks.peers.classic import Classic
from benchmarks.peers.contestant import Tokens, undisturbed


class TransformerLens(Classic):
    """A model of theirs and a pair of prompts, ready for the cells of any grid."""

    libraries = ("transformer_lens",)
    ways = ("unprocessed", "processed")

    def __init__(self) -> None:
        super().__init__()
        self._corrupted = torch.zeros(1, 0, dtype=torch.long)
        self._clean_cache: Any = None

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        return {"set_prompts": self.set_prompts, "patch": self.patch}

    @torch.inference_mode()
    def set_prompts(self, clean: Tokens, corrupted: Tokens) -> None:
        """Run the clean prompts [batch pos] and keep all their activations."""
        self._corrupted = torch.tensor(corrupted)
        _, self._clean_cache = self.model.run_with_cache(torch.tensor(clean))

    @torch.inference_mode()
    def patch(
        self, activation: str, setter: str, axes: Sequence[str], cells: Sequence[Sequence[int]], answer: int, wrong: int
    ) -> dict[str, Any]:
        """Return the seconds that some cells of a grid take, and their values.

        Args:
            activation: short name of what is patched.
            setter: name of the patching module's function that patches it.
            axes: what the numbers of a cell mean.
            cells: indices.
            answer: the metric is this token's logit at the last position ...
            wrong: ... minus this one's.
        """

        def logit_difference(logits: Tensor) -> Tensor:
            return (logits[:, -1, answer] - logits[:, -1, wrong]).mean()

        index_df = pandas.DataFrame(list(cells), columns=list(axes))
        with undisturbed():
            start = perf_counter()
            values = patching.generic_activation_patch(
                self.model,
                self._corrupted,
                self._clean_cache,
                logit_difference,
                getattr(patching, setter),
                activation,
                index_df=index_df,
            )
            seconds = perf_counter() - start
        return {"seconds": seconds, "values": values.tolist()}


def tokenizer_in(folder: Path) -> Any:
    """Return the tokenizer beside a model. It would otherwise be looked for on the hub; no text is read here."""
    return AutoTokenizer.from_pretrained(str(folder / "tokenizer"), trust_remote_code=False)
