"""What a sweep asks of workers: that they have its model, and answer bytes with bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from hooked_lm.components.stock import stages_obstacle
from hooked_lm.hooked_model import HookedModel
from hooked_lm.hooks import any_live
from hooked_lm.metrics import Metric

__all__ = ["WorkerError", "Workers", "check_workers"]


class WorkerError(RuntimeError):
    """A part of a sweep failed in a worker, or was lost with two of them."""


class Workers(Protocol):
    """Several models that score parts of a sweep; see `hooked_lm.workers`."""

    def check(self, model: HookedModel) -> None:
        """Raise ValueError if the workers do not have this model as it is now."""
        ...

    def run_all(self, bodies: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """Yield the place of each body among them and its answer, in the order in which answers come.

        Raises:
            WorkerError: one failed.
        """
        ...


def check_workers(model: HookedModel, metric: object, workers: Workers) -> None:
    """Check that workers can score a sweep of a model.

    Args:
        model: of this process.
        metric: of the sweep.
        workers: that are to score it.

    Raises:
        ValueError: the metric is a function, the model has hooks or components of its own, or is not that of the
            workers.
    """
    if not isinstance(metric, Metric) or metric.maker is None:
        raise ValueError(
            f"workers need a metric that they can make by its name, one of hooked_lm.metrics; got {metric!r}, which is "
            "a function of this process"
        )
    changed = stages_obstacle(model)  # type: ignore[arg-type]
    if changed is not None or any_live(model.hook_points()):
        raise ValueError(f"workers do not have what this process added: {changed or 'the model has hooks'}")
    workers.check(model)
