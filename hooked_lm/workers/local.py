"""InProcess: models of this process as workers, such as copies of one model on several devices."""

from __future__ import annotations

from hooked_lm.hooked_model import HookedModel
from hooked_lm.sweep.engine import run_part
from hooked_lm.workers.pool import Pool, contents_of

__all__ = ["InProcess"]


class InProcess(Pool):
    """Workers that are models of this process, each with a thread of its own.

    Args:
        *models: one model, or copies of it on other devices.

    Raises:
        ValueError: no model, or different ones.
    """

    def __init__(self, *models: HookedModel) -> None:
        if not models:
            raise ValueError("InProcess takes a model, or copies of one on several devices")
        if any(contents_of(one) != contents_of(models[0]) for one in models[1:]):
            raise ValueError("the models of InProcess are copies of one model; these differ in weights or config")
        super().__init__([_Local(model) for model in models], models[0])


class _Local:
    def __init__(self, model: HookedModel) -> None:
        self.model = model

    def run(self, body: bytes) -> bytes:
        return run_part(self.model, body)

    def close(self) -> None:
        """A model of this process stays."""
