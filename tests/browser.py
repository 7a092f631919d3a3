"""One of every kind of figure, and a browser that watches what a page does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_lm import plotting
from hooked_lm.circuits import InformationRoutes, RouteEdge, RouteNode
from hooked_lm.plotting.static import browser_flags, find_browser

PROMPT = [
    "<|endoftext|>",
    "When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " <b>store</b>",
    ",",
    " John",
    " gave",
]
PROMPT += [" a", " drink", " to"]
HEADS = [f"L0H{head}" for head in range(12)]


def attention(n_heads: int, n: int, seed: int = 0) -> np.ndarray:
    """Causal patterns [head query key]: a previous-token head, a first-token head, and heads that are less clear."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(n_heads, n, n)) * 1.5
    place = np.arange(n)
    for head in range(n_heads):
        kind = head % 4
        if kind == 0:
            scores[head] += 6.0 * (place[:, None] - place == 1 + head // 4)
        elif kind == 1:
            scores[head, :, 0] += 4.0
        elif kind == 2:
            scores[head] -= 0.35 * np.abs(place[:, None] - place)
    scores = np.where(place[:, None] >= place, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def composition(n_layers: int, n_heads: int) -> np.ndarray:
    """Composition scores [layer head layer head], with a few pairs that stand out."""
    scores = np.random.default_rng(3).uniform(0.02, 0.12, size=(n_layers, n_heads, n_layers, n_heads))
    layer = np.arange(n_layers)
    for writer, reader, score in (((0, 1), (1, 2), 0.51), ((0, 1), (2, 0), 0.32), ((1, 2), (3, 3), 0.27)):
        if reader[0] < n_layers:
            scores[(*writer, *reader)] = score
    return scores * (layer[:, None, None, None] < layer[:, None])


def routes() -> InformationRoutes:
    """Two layers of attention alone: the last token reads a name, which has read its title, and the stream goes on."""
    first, name, last = (RouteNode(0, "0_pre", 3), RouteNode(0, "0_pre", 4), RouteNode(0, "0_pre", 14))
    middle, end = (RouteNode(1, "0_post", 4), RouteNode(1, "0_post", 14)), RouteNode(2, "1_post", 14)
    edges = (
        RouteEdge("residual", 1, None, middle[1], end, 0.6, 0.6),
        RouteEdge("head", 1, 4, middle[0], end, 0.3, 0.3),
        RouteEdge("bias", 1, None, None, end, 0.1, 0.1),
        RouteEdge("residual", 0, None, last, middle[1], 1.0, 0.6),
        RouteEdge("head", 0, 1, first, middle[0], 0.75, 0.225),
        RouteEdge("head", 0, 2, name, middle[0], 0.25, 0.075),
    )
    inputs, tokens = torch.zeros(15), torch.arange(15)
    inputs[[3, 4, 14]] = torch.tensor([0.225, 0.075, 0.6])
    return InformationRoutes(tokens, tuple(PROMPT), end, 0.04, edges, inputs, 0.1, (), 2, 8, 0.0)


def gallery() -> dict[str, plotting.Figure | plotting.HtmlFigure]:
    """Return one of every kind of figure, and some that are large."""
    generator = np.random.default_rng(0)
    n, grid = len(PROMPT), np.zeros((6, len(PROMPT)))
    grid[:3, 10], grid[2:, 14], grid[1:3, 11] = [0.9, 0.97, 0.55], [0.05, 0.4, 0.83, 1.0], [-0.1, -0.22]
    grid += generator.normal(size=grid.shape) * 0.02
    layers = [f"layer {layer}" for layer in range(6)]
    words = [
        [[" store", " shop", " park"], [" Mary", " John", " her"]][(site + place) % 5 == 0]
        for site in range(7)
        for place in range(n)
    ]
    table = [words[site * n : (site + 1) * n] for site in range(7)]
    likely = np.sort(generator.dirichlet([0.4] * 3, size=(7, n)), axis=-1)[..., ::-1]
    parts = [
        "embed",
        *(f"L{layer}H{head}" for layer, head in ((3, 0), (4, 2), (5, 1), (5, 3))),
        "MLP 4",
        "MLP 5",
        "bias",
    ]
    added = [0.21, 1.32, -0.48, 2.61, 1.05, -0.9, 0.37, -0.02]
    steps = range(0, 2001, 40)
    run = [
        {"step": s, "loss": 4.2 * np.exp(-s / 500) + 0.4 + 0.03 * np.sin(s), "lr": 1e-3, "grad_norm": 1.0}
        for s in steps
    ]
    for row in run[::5]:
        row["accuracy"] = 1 - np.exp(-row["step"] / 600)
    return {
        "attention_pattern": plotting.attention_pattern(attention(1, n)[0], PROMPT, "L0H0"),
        "log_prob_curve": plotting.log_prob_curve(
            np.r_[generator.normal(-4.6, 0.3, 20), generator.normal(-0.3, 0.1, 20)], 21, -4.5, "A repeat"
        ),
        "head_scores": plotting.head_scores(generator.beta(0.4, 2, size=(4, 8)), "Induction score"),
        "composition_matrix": plotting.composition_matrix(
            composition(2, 6)[0, :, 1], HEADS[:6], [f"L1H{h}" for h in range(6)], "K-composition"
        ),
        "ablation_bars": plotting.ablation_bars(
            ["intact", "without L0H1", "without L1H2", "without L1H3"],
            [0.04, 5.2, 5.5, 0.05],
            [False, True, True, False],
            "loss (nats)",
            "Ablations",
        ),
        "layer_curves": plotting.layer_curves(
            {"mean state": [0.1, 0.3, 0.8, 0.7, 0.4, 0.2], "heads": [0.1, 0.2, 0.6, 0.65, 0.3, 0.1]},
            layers,
            "accuracy",
            {"chance": 0.08},
            "Steering",
        ),
        "patching_grid": plotting.patching_grid(grid, PROMPT, unit="brought back", limit=1.0, title="Residual stream"),
        "patching_grid_heads": plotting.patching_grid(
            generator.normal(size=(12, 12)) ** 3, axis="head", unit="logit difference", title="Heads"
        ),
        "patching_grid_large": plotting.patching_grid(
            generator.normal(size=(24, 60)), [f" w{i % 9}" for i in range(60)], title="24 layers, 60 positions"
        ),
        "lens_table": plotting.lens_table(
            table, likely, [f"{i}_pre" for i in range(6)] + ["final"], PROMPT, "Logit lens"
        ),
        "attribution_bars": plotting.attribution_bars(parts, added, title="Direct logit attribution"),
        "attribution_waterfall": plotting.attribution_waterfall(
            parts, added, 4.31, title="Direct logit attribution, summed"
        ),
        "training_curves": plotting.training_curves(run, title="A training run"),
        "composition_graph": plotting.composition_graph(
            composition(4, 6), top=12, unit="K-composition", title="Who reads whom"
        ),
        "effect_intervals": plotting.effect_intervals(
            ["L0H4", "L1H1", "L2H0"],
            [0.62, -0.2, 0.03],
            [0.39, -0.31, -0.05],
            [0.86, -0.1, 0.11],
            marked=[True, True, False],
            title="What ablating a head costs",
        ),
        "stacked_bars": plotting.stacked_bars(
            {"attention": [1.0, 1.2], "MLP": [2.0, 1.9], "norms": [0.2, 0.2]},
            ["layer 0", "layer 1"],
            axis="milliseconds",
            title="A profile",
        ),
        "site_map": plotting.site_map(
            np.arange(24.0).reshape(4, 6) / 8 - 3,
            ["hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "log-probabilities"],
            PROMPT[:6],
            unit="log10 of the difference",
            title="Where two models differ",
        ),
        "route_graph": plotting.route_graph(routes(), "Routes to the last token"),
        "attention_heads": plotting.attention_heads(attention(12, n), PROMPT, HEADS, "Layer 0"),
        "attention_heads_large": plotting.attention_heads(
            attention(144, 60), [f" w{i % 9}" for i in range(60)], None, "144 heads"
        ),
        "coloured_tokens": plotting.coloured_tokens(
            [*PROMPT, "\n", "</script>", " é", " 日本"],
            [np.nan, *generator.normal(0, 2, n + 3)],
            unit="log-probability",
            title="Surprise",
        ),
    }


# The browser

HEIGHT = 900


def chromium() -> str | None:
    """Return the path of the browser that figures are drawn with, if there is one."""
    try:
        return find_browser()
    except (ImportError, RuntimeError):
        return None


def required() -> bool:
    """Whether tests that find no browser fail, as where everything is checked, and are not skipped."""
    return os.environ.get("HOOKED_LM_BROWSER") == "required"


@contextmanager
def launched() -> Iterator[Any]:
    """Yield a headless browser; without one, skip the test or, where one is required, fail it.

    While it runs its thread has an event loop, and `asyncio.run` fails there: close it before other tests begin.
    """
    path = chromium()
    if path is None or find_spec("playwright") is None:
        (pytest.fail if required() else pytest.skip)(
            "no Chromium or Chrome, or no playwright to drive it, is installed"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=browser_flags())
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 980, **options: Any) -> Iterator[Any]:
    """Yield the page of a file. At the end nothing may have gone wrong on it, and nothing been asked of the network."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, **options)
    wrong: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("data:", "blob:")) or wrong.append(request.url))
    try:
        page.goto(path.as_uri())
        yield page
    finally:
        page.close()
    # The page itself is a file, and the only one.
    if wrong != [path.as_uri()]:
        raise AssertionError(f"{path.name} said or asked for more than itself: {wrong}")


def plot_point(page: Any, x: Any, y: Any, yaxis: str = "yaxis") -> tuple[float, float]:
    """Return where a point of a plotly figure is in the window; x and y are values on its axes."""
    return tuple(
        page.evaluate(
            """([x, y, name]) => {
              const plot = document.querySelector(".plotly-graph-div"), box = plot.getBoundingClientRect();
              const [across, down] = [plot._fullLayout.xaxis, plot._fullLayout[name]];
              return [box.left + across._offset + across.d2p(x), box.top + down._offset + down.d2p(y)];
            }""",
            [x, y, yaxis],
        )
    )


def plot_hover(page: Any, x: Any, y: Any, yaxis: str = "yaxis") -> str:
    """Return what a plotly figure says where one points at values on its axes."""
    page.mouse.move(*plot_point(page, x, y, yaxis))
    label = page.locator(".hoverlayer .hovertext")
    label.first.wait_for(timeout=3000)
    lines = page.evaluate(
        """() => [...document.querySelectorAll(".hoverlayer .hovertext text")].map(
          (text) => [...text.querySelectorAll("tspan.line")].map((line) => line.textContent).join("\\n")
                    || text.textContent).join("\\n")"""
    )
    return str(lines).strip()
