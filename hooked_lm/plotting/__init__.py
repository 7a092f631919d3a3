"""Figures of what a model does: arrays in, plotly figures out. Needs the extra `viz`."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("plotly") is None:
    raise ImportError("hooked_lm.plotting draws with plotly, which is not installed: pip install 'hooked-lm[viz]'")

from hooked_lm.plotting.curves import layer_curves
from hooked_lm.plotting.figures import (
    ablation_bars,
    attention_pattern,
    composition_matrix,
    head_scores,
    log_prob_curve,
)
from hooked_lm.plotting.maps import lens_table, patching_grid
from hooked_lm.plotting.page import PageFigure, page_html, write_page

__all__ = [
    "PageFigure",
    "ablation_bars",
    "attention_pattern",
    "composition_matrix",
    "head_scores",
    "layer_curves",
    "lens_table",
    "log_prob_curve",
    "page_html",
    "patching_grid",
    "write_page",
]
