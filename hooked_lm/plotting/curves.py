"""Curves: over layers, along a sequence, over a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from hooked_lm._support.reading import parse_json, read_text
from hooked_lm.plotting.figure import Figure
from hooked_lm.plotting.style import BLUE, CURVES, INK, MUTED, ORANGE, RUST, categories, styled, text
from hooked_lm.utils import ArrayLike, to_numpy

__all__ = ["layer_curves", "log_prob_curve", "training_curves"]

# The keys of every record of a run that are not results.
_SETTINGS = ("step", "lr", "grad_norm")
# The height of a panel and of the gap between two, in pixels.
_PANEL, _GAP = 150, 44


def layer_curves(
    curves: Mapping[str, ArrayLike],
    labels: Sequence[str],
    axis: str = "",
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Return one curve for each name, over the same labelled points, with a legend if there are several.

    Args:
        curves: name -> values [point].
        labels: of the points, from left to right.
        axis: the title of the values' axis.
        levels: name -> a value that does not depend on the point, drawn as a dotted line.
        title: of the figure.

    Raises:
        ValueError: there are no curves, more than five, or one is not as long as the labels.
    """
    if not 1 <= len(curves) <= len(CURVES):
        raise ValueError(f"1 to {len(CURVES)} curves can be told apart; got {len(curves)}")
    places = categories(labels, letters=22)
    figure = Figure()
    for (name, values), colour in zip(curves.items(), CURVES, strict=False):
        points = to_numpy(values)
        if points.shape != (len(labels),):
            raise ValueError(f"the curve {name!r} has shape {points.shape}, and there are {len(labels)} labels")
        figure.add_scatter(
            x=places,
            y=points,
            name=text(name),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            customdata=[text(label) for label in labels],
            hovertemplate=f"{text(name)}<br>%{{customdata}}: %{{y:.3f}}<extra></extra>",
        )
    for name, level in (levels or {}).items():
        _level(figure, level, name)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=text(axis), rangemode="tozero")
    several = len(curves) > 1
    styled(figure, title, height=360 if several else 340)
    if several:
        figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0})
        figure.update_layout(margin_t=78 if title else 40)
    return figure


def log_prob_curve(
    log_probs: ArrayLike, repeat_at: int | None = None, chance: float | None = None, title: str = ""
) -> Figure:
    """Return the log-probability of each next token along the sequence.

    Args:
        log_probs: [pos], in nats; entry `i` is about the token at position `i + 1`.
        repeat_at: the position where the repeat begins, marked by a line.
        chance: the log-probability of a guess, marked by a line.
        title: of the figure.

    Raises:
        ValueError: the log-probabilities have more axes than one, or none.
    """
    values = to_numpy(log_probs)
    if values.ndim != 1:
        raise ValueError(f"log-probabilities [pos] are expected, got shape {values.shape}")
    positions = np.arange(1, len(values) + 1)
    figure = Figure(
        go.Scatter(
            x=positions,
            y=values,
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"size": 5},
            hovertemplate="token at position %{x}<br>log-probability %{y:.3f}<extra></extra>",
        )
    )
    if chance is not None:
        _level(figure, chance, "a guess")
    if repeat_at is not None:
        figure.add_vline(repeat_at - 0.5, line={"color": ORANGE, "width": 1.5})
        figure.add_annotation(
            x=repeat_at,
            y=0.5,
            yref="paper",
            text="the repeat begins",
            showarrow=False,
            xanchor="left",
            xshift=6,
            font={"color": RUST},
        )
    figure.update_xaxes(title="position of the token predicted")
    figure.update_yaxes(title="log-probability (nats)", rangemode="tozero")
    return styled(figure, title, height=340)


def training_curves(
    records: Sequence[Mapping[str, float]] | str | Path, keys: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Return a training run: a panel for each quantity, one under the other, over the same steps.

    Args:
        records: the result of `training.train`, a dictionary for each logged step with its `step`; or the path of the
            `metrics.jsonl` that it writes. A record need not have every quantity.
        keys: which quantities to draw, from top to bottom; by default the loss and whatever the run's `metrics`
            returned: all but `step`, `lr` and `grad_norm`.
        title: of the figure.

    Raises:
        ValueError: there are no records, one has no step, a line of the file is no record, or none has a given key.
    """
    rows = _read(Path(records)) if isinstance(records, (str, Path)) else list(records)
    names = _quantities(rows, keys)
    figure = Figure()
    high = _PANEL * len(names) + _GAP * (len(names) - 1)
    for place, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        top = 1 - place * (_PANEL + _GAP) / high
        _panel(figure, name, points, "y" if place == 0 else f"y{place + 1}", max(top - _PANEL / high, 0.0), top)
    # One x axis for all panels, under the lowest.
    figure.update_xaxes(title="step", anchor="y" if len(names) == 1 else f"y{len(names)}", rangemode="tozero")
    above = 76 if title else 36
    styled(figure, title, height=high + above + 50)
    return figure.update_layout(margin_t=above)


def _quantities(rows: Sequence[Mapping[str, float]], keys: Sequence[str] | None) -> list[str]:
    """The quantities to draw; raises the errors of `training_curves`."""
    if not rows:
        raise ValueError("there are no records to draw")
    for place, row in enumerate(rows):
        if "step" not in row:
            raise ValueError(f"record {place} has no 'step', only {', '.join(map(repr, row)) or 'nothing'}")
    logged = list(dict.fromkeys(key for row in rows for key in row))
    names = [key for key in logged if key not in _SETTINGS] if keys is None else list(keys)
    missing = [name for name in names if name not in logged or name == "step"]
    if missing or not names:
        raise ValueError(
            f"no record has {', '.join(map(repr, missing)) or 'a quantity'}: they have {', '.join(logged)}"
        )
    return names


def _panel(figure: Figure, name: str, points: list[tuple[float, float]], axis: str, low: float, top: float) -> None:
    """Draw a quantity in a panel of its own: its y axis, between these shares of the height, and its name over it."""
    figure.add_scatter(
        x=[step for step, _ in points],
        y=[value for _, value in points],
        name=text(name),
        mode="lines" if len(points) > 60 else "lines+markers",
        line={"color": BLUE, "width": 2},
        marker={"size": 5},
        cliponaxis=False,
        yaxis=axis,
        hovertemplate=f"{text(name)} %{{y:.4~g}}<br>after step %{{x}}<extra></extra>",
    )
    figure.update_layout({axis.replace("y", "yaxis"): {"domain": [low, top], "nticks": 5}})
    figure.add_annotation(
        x=0,
        xref="paper",
        xanchor="left",
        y=top,
        yref="paper",
        yanchor="bottom",
        text=text(name),
        showarrow=False,
        font={"color": INK},
    )


def _read(path: Path) -> list[dict[str, float]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = parse_json(line, "the line")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: this is no record: {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: this is no record: {line[:60]!r}")
        rows.append(row)
    return rows


def _level(figure: Figure, level: float, name: str) -> None:
    """A dotted line across, with its name at the right."""
    figure.add_hline(level, line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=level,
        yanchor="bottom",
        text=text(name),
        showarrow=False,
        font={"color": MUTED},
        bgcolor="rgba(255, 255, 255, 0.7)",
    )
