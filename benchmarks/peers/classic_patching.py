"""What both versions of `transformer_lens` share: their patching module, used as in their own tutorials."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor
from transformer_lens import patching  # type: ignore[import-not-found]

from benchmarks.peers.serving import serve


class ClassicPatching:
    """A model of theirs and a pair of prompts, ready for the cells of any grid."""

    def __init__(self, load_model: Callable[[Path], Any]) -> None:
        self._load_model = load_model
        self._model: Any = None
        self._corrupted = torch.zeros(1, 0, dtype=torch.long)
        self._clean_cache: Any = None

    def load(self, folder: str, threads: int) -> dict[str, str]:
        """Load the weights in a folder, and return the versions of what computes here."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = self._load_model(Path(folder))
        libraries = ("transformer_lens", "torch", "transformers")
        return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in libraries}

    def set_prompts(self, clean: Sequence[Sequence[int]], corrupted: Sequence[Sequence[int]]) -> None:
        """Run the clean prompts [batch pos] and keep all their activations."""
        self._corrupted = torch.tensor(corrupted)
        _, self._clean_cache = self._model.run_with_cache(torch.tensor(clean))

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
        start = time.perf_counter()
        values = patching.generic_activation_patch(
            self._model,
            self._corrupted,
            self._clean_cache,
            logit_difference,
            getattr(patching, setter),
            activation,
            index_df=index_df,
        )
        return {"seconds": time.perf_counter() - start, "values": values.tolist()}


def serve_patching(load_model: Callable[[Path], Any]) -> None:
    """Answer requests about a model that is loaded from the folder of weights by the function given."""
    peer = ClassicPatching(load_model)
    serve({"load": peer.load, "set_prompts": peer.set_prompts, "patch": peer.patch})
