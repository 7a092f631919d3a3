"""ModelSource: which model a worker loads, and how."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_lm.transformer import HookedTransformer

__all__ = ["ModelSource"]


@dataclass(frozen=True)
class ModelSource:
    """Which model a worker loads.

    Attributes:
        name: as for `from_pretrained`.
        revision: branch, tag or commit on the hub.
        device: where it runs; with several ranks and `"cuda"`, each on a device of its own.
        dtype: `"float64"`; None for that of the checkpoint.
        processing: make the processing steps of `from_pretrained`.
        ranks: processes that share out its heads and neurons.
        rank_timeout: seconds after which one of them that is silent counts as lost.
    """

    name: str
    revision: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    processing: bool = True
    ranks: int = 1
    rank_timeout: float = 120.0

    def load(self) -> HookedTransformer:
        """Return the model, of one process."""
        build = HookedTransformer.from_pretrained
        if not self.processing:
            build = HookedTransformer.from_pretrained_no_processing
        return build(self.name, revision=self.revision, device=self.device, dtype=self.dtype)
