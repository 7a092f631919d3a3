"""Thousands of interventions, one value each, without running the model thousands of times."""

from hooked_lm.sweep.engine import AnyMetric, sweep

__all__ = ["AnyMetric", "sweep"]
