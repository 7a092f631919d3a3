"""Measurements, as ratios of things timed in turn within one run."""
