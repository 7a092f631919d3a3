"""Traces of every family: reads, edits, patches between prompts and gradients are what plain runs give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.metrics import log_prob
from hooked_lm.tracing import Trace
from tests.family_rows import ROWS, Row
from tests.tracing.interpreter import interpret

# A variant of a family differs in a config field that the tests of families hold.
FIRST_ROWS = list({row.architecture: row for row in reversed(ROWS)}.values())
# Shapes are checked by the tests of families.
pytestmark = pytest.mark.usefixtures("no_type_checks")
families = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in FIRST_ROWS])


def model_of(row: Row, folder: Any) -> HookedTransformer:
    row.save(row.build(), folder)
    return HookedTransformer.from_pretrained_no_processing(folder, tokenizer=False).to(torch.float64)


def record(trace: Trace, row: Row, model: HookedTransformer) -> Trace:
    """An experiment with every kind of edit, at every kind of site that the family has."""
    whole, last = row.tokens(3).tolist(), model.cfg.n_layers - 1
    source = trace.prompts([whole[0], whole[1][:-2]])
    target = trace.prompts([whole[2][:-3], whole[1]])
    middle = last if model.cfg.shortcut_experts else max(last - 1, 0)
    state = source["resid_pre", middle].at(pos=-1)
    target["resid_pre", middle].at(pos=-2).replace(state)
    target["z", middle].at(pos=-1, head=0).scale(1.5)
    target["pattern", last].at(pos=-1, head=-1).scale(0.5)
    target["attn_out", last].at(pos=slice(-2, None)).add(source["attn_out", 0].at(pos=-1, batch=0))
    # Each prompt's own first token, which later ones attend to in the layers above.
    target["blocks.0.hook_mlp_out"].at(pos=0).zero()
    target["resid_post", last].at(pos=slice(-4, None)).save("stream")
    source["q", last].at(pos=-1).save("queries")
    score = target.metric(log_prob(5))
    score.save("score")
    first, later = trace.gradient(score.sum(), of=[target["resid_pre", 0].at(pos=-1), target["z", last].at(pos=-1)])
    first.save("gradient of the stream")
    later.save("gradient of z")
    return trace


@families
def test_an_experiment_gives_what_plain_runs_of_each_prompt_give(row: Row, tmp_path: Any) -> None:
    model = model_of(row, tmp_path)
    trace = record(model.trace(run=False), row, model)
    found, expected = trace.run(), interpret(model, trace.graph)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10)
    # The model's own side of padding does not matter.
    model.cfg.default_padding_side = "left" if model.cfg.default_padding_side == "right" else "right"
    again = record(model.trace(run=False), row, model).run()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


@families
@torch.no_grad()
def test_in_bfloat16_a_run_by_itself_is_the_hooked_run_to_the_bit(row: Row, tmp_path: Any) -> None:
    model = model_of(row, tmp_path).to(torch.bfloat16)
    tokens, last = row.tokens(1), model.cfg.n_layers - 1
    value = torch.linspace(-1, 1, model.cfg.d_model)  # float32: it takes the dtype of the site
    with model.trace() as t:
        run = t.prompts(tokens)
        run["resid_pre", last].at(pos=-1).add(value)
        run["z", 0].at(pos=0, head=0).scale(2.0)
        run["resid_post", last].save("stream")
        t.logits_of(run["resid_post", last].at(pos=-1)).save("logits")

    def add(x: Tensor, hook: object) -> Tensor:
        x[:, -1] += value.to(torch.bfloat16)
        return x

    def double(x: Tensor, hook: object) -> Tensor:
        x[:, 0, 0] *= 2
        return x

    edits = [(f"blocks.{last}.hook_resid_pre", add), ("blocks.0.attn.hook_z", double)]
    with model.hooks(fwd_hooks=edits):
        logits, cache = model.run_with_cache(tokens, names_filter="*hook_resid_post")
    assert t["stream"].dtype == torch.bfloat16
    assert torch.equal(t["stream"], cache["resid_post", last])
    # The unembedding of one position rounds otherwise than that of all.
    torch.testing.assert_close(t["logits"], logits[:, -1], rtol=2e-2, atol=2e-2)
