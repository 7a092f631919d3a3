"""Figures of what a model does: from arrays and strings to figures that can be saved. Needs the extra `viz`.

    figure = plotting.attention_pattern(cache["pattern", 1][0, 3], model.to_str_tokens(prompt))
    figure.save("pattern.html")

Labels are shown as they are: markup in a token is escaped, and spaces at its ends are made visible.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("plotly") is None:
    raise ImportError("hooked_lm.plotting draws with plotly, which is not installed: pip install 'hooked-lm[viz]'")

from hooked_lm.plotting.attention import attention_heads
from hooked_lm.plotting.attribution import attribution_bars, attribution_waterfall
from hooked_lm.plotting.bars import stacked_bars
from hooked_lm.plotting.curves import layer_curves, log_prob_curve, training_curves
from hooked_lm.plotting.figure import Figure, HtmlFigure
from hooked_lm.plotting.figures import ablation_bars, attention_pattern, composition_matrix, head_scores
from hooked_lm.plotting.graph import composition_graph
from hooked_lm.plotting.intervals import effect_intervals
from hooked_lm.plotting.maps import lens_table, patching_grid, site_map
from hooked_lm.plotting.page import PageFigure, page_html, write_page
from hooked_lm.plotting.routes import route_graph
from hooked_lm.plotting.tokens import coloured_tokens

__all__ = [
    "Figure",
    "HtmlFigure",
    "PageFigure",
    "ablation_bars",
    "attention_heads",
    "attention_pattern",
    "attribution_bars",
    "attribution_waterfall",
    "coloured_tokens",
    "composition_graph",
    "composition_matrix",
    "effect_intervals",
    "head_scores",
    "layer_curves",
    "lens_table",
    "log_prob_curve",
    "page_html",
    "patching_grid",
    "route_graph",
    "site_map",
    "stacked_bars",
    "training_curves",
    "write_page",
]
