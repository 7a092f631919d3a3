"""The checkpoints that some series of models published from during their training, and their revisions on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from weight_conversion.aliases import hub_id
from weight_conversion.errors import CheckpointError

__all__ = ["SERIES", "Series", "TrainingCheckpoint", "training_checkpoint"]


@dataclass(frozen=True)
class Series:
    """Models whose training checkpoints are revisions on the hub.

    Attributes:
        models: a glob of hub ids.
        revision: the revision's name, with `{step}`.
        steps: the training steps there are, in order.
    """

    models: str
    revision: str
    steps: tuple[int, ...]


@dataclass(frozen=True)
class TrainingCheckpoint:
    """One checkpoint of a series: its place in the series, its training step, its revision on the hub."""

    index: int
    value: int
    revision: str


# Biderman et al. 2023, "Pythia", section 2.1: powers of two up to 512, then every thousandth step,
# which is all that the first version of the models has.
_PYTHIA_V0 = tuple(range(1000, 143_001, 1000))
_PYTHIA = (0, *(2**power for power in range(10)), *_PYTHIA_V0)
# Karamcheti et al. 2021, "Mistral": every 10th step to 100, 50th to 2,000, 100th to 20,000, 1,000th to 400,000.
_STANFORD = (
    *range(0, 100, 10),
    *range(100, 2000, 50),
    *range(2000, 20_000, 100),
    *range(20_000, 400_001, 1000),
)

# In order: a model belongs to the first series that matches.
SERIES = (
    Series("EleutherAI/pythia-*-v0", "step{step}", _PYTHIA_V0),
    Series("EleutherAI/pythia-*", "step{step}", _PYTHIA),
    Series("stanford-crfm/*-gpt2-*", "checkpoint-{step}", _STANFORD),
)


def training_checkpoint(
    name: str, index: int | None, value: int | None, revision: str | None = None
) -> TrainingCheckpoint:
    """Return a model's training checkpoint by its place in the series or by its step.

    Args:
        name: an alias or hub id.
        index: place in the series; negative counts from the end.
        value: training step.
        revision: has to be None, because the checkpoint decides the revision.

    Raises:
        CheckpointError: the model has no training checkpoints or not this one, or two of the arguments name one.
    """
    given = {"checkpoint_index": index, "checkpoint_value": value, "revision": revision}
    named = [argument for argument, it in given.items() if it is not None]
    if len(named) > 1:
        raise CheckpointError(f"{' and '.join(named)} each say which checkpoint: give one of them")
    full = hub_id(name)
    series = next((series for series in SERIES if fnmatchcase(full, series.models)), None)
    if series is None:
        known = ", ".join(series.models for series in SERIES)
        raise CheckpointError(f"{name} is of no series that publishes training checkpoints; those are {known}")
    steps = series.steps
    if value is not None:
        if value not in steps:
            near = sorted(steps, key=lambda step: abs(step - value))[:3]
            raise CheckpointError(f"{name} has no checkpoint at step {value}; the nearest are {sorted(near)}")
        index = steps.index(value)
    assert index is not None
    if not -len(steps) <= index < len(steps):
        raise CheckpointError(f"{name} has {len(steps)} checkpoints, so checkpoint_index={index} is out of range")
    step = steps[index]
    return TrainingCheckpoint(index % len(steps), step, series.revision.format(step=step))
