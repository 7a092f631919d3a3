"""Draw the README's figure: where a small model carries who was given something, and which heads it needs.

    python -m scripts.readme_figure

The figure is that of the README's example, with both prompts' tokens, at twice the pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from plotly.subplots import make_subplots

from hooked_lm import HookedTransformer, metrics, patching, plotting
from hooked_lm.plotting.style import DIVERGING, styled

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "patching.png"
CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"


@torch.no_grad()
def draw() -> plotting.Figure:
    """Return the grid by layer and position beside the one by layer and head."""
    model = HookedTransformer.from_pretrained("demo-tasks-4l")
    clean, corrupted = model.to_tokens(CLEAN), model.to_tokens(CORRUPTED)
    metric = metrics.logit_diff(model.to_single_token(" Mary"), model.to_single_token(" John"))
    logits, cache = model.run_with_cache(clean)
    low, high = float(metric(model(corrupted))), float(metric(logits))
    by_position = patching.get_act_patch_resid_pre(model, corrupted, cache, metric, verbose=False)
    by_head = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric, verbose=False)
    words = [word.strip() for word in model.to_str_tokens(clean[0])]
    words[0] = "start"
    figure = plotting.Figure(
        make_subplots(
            cols=2,
            column_widths=[0.66, 0.34],
            horizontal_spacing=0.1,
            subplot_titles=["the residual stream before each layer", "the output of each head"],
        )
    )
    for column, (grid, numbers) in enumerate(((by_position, None), (by_head, "%{z:.2f}")), start=1):
        figure.add_heatmap(
            z=((grid - low) / (high - low)).numpy(),
            zmin=-1.0,
            zmax=1.0,
            colorscale=DIVERGING,
            showscale=False,
            texttemplate=numbers,
            xgap=2,
            ygap=2,
            col=column,
            row=1,
        )
    styled(figure, "", height=330, grid=False)
    figure.update_xaxes(tickvals=list(range(len(words))), ticktext=words, tickangle=-45, col=1)
    figure.update_xaxes(title="head", dtick=1, col=2)
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(title="layer", col=1)
    return figure.update_layout(margin={"l": 10, "r": 10, "t": 40, "b": 10})


if __name__ == "__main__":
    draw().save(PICTURE, width=980)
