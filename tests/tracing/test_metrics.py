"""Metrics in traces: all of them, and what tasks are scored by, are the same behind the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformer
from hooked_lm.metrics import Metric, get_metric, metric_names
from hooked_lm.tasks import get_task, score
from hooked_lm.tracing import Trace
from hooked_lm.tracing.executor import run_trace
from hooked_lm.tracing.reading import from_bytes
from hooked_lm.tracing.wire import to_bytes
from tests.helpers import tiny_model, tiny_tokens

BUILT_IN = ("logit", "logit_diff", "preferred", "prob", "log_prob", "rank", "accuracy", "kl_to")
DIVERGENCE = {"reference": torch.linspace(-1, 1, 20, dtype=torch.float64).expand(2, 4, 20)}
ARGUMENTS: dict[str, dict[str, Any]] = {
    **{key: {"answer": [3, 4]} for key in ("logit", "prob", "log_prob", "rank", "accuracy")},
    **{key: {"answer": 3, "wrong": [5, 6]} for key in ("logit_diff", "preferred")},
    "kl_to": DIVERGENCE,
}


def after_the_wire(model: HookedTransformer, trace: Trace) -> dict[str, torch.Tensor]:
    return run_trace(model, from_bytes(to_bytes(trace.graph, trace.target), trace.target), trace.target)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("pos", [-1, 0])
def test_a_metric_is_what_it_is_of_the_logits_here_and_behind_the_wire(name: str, pos: int) -> None:
    assert set(BUILT_IN) <= set(metric_names())
    model, tokens = tiny_model(), tiny_tokens(2, 4)
    metric: Metric = get_metric(name)(**ARGUMENTS[name], pos=pos)
    with model.trace() as t:
        t.prompts(tokens).metric(metric).save("score")
    torch.testing.assert_close(t["score"], metric.per_prompt(model(tokens).detach()), rtol=1e-12, atol=1e-12)
    assert torch.equal(after_the_wire(model, t)["score"], t["score"])


@pytest.mark.parametrize("task", ["ioi", "capitals"])
def test_what_a_task_is_scored_by_travels(task: str) -> None:
    model = HookedTransformer.from_pretrained("demo-tasks-4l")
    group = get_task(task).examples(6).groups(model.tokenizer)[0]
    tokens = group.tokens(model)
    with model.trace() as t:
        run = t.prompts(tokens.clean)
        for name, metric in tokens.metrics().items():
            run.metric(metric).save(name)
    found, scored = after_the_wire(model, t), score(model, group)
    with torch.no_grad():
        logits = model(tokens.clean)[:, -1]
    right, wrong = (logits.gather(-1, chosen[:, None])[:, 0] for chosen in (tokens.answers, tokens.wrong))
    by_hand = {
        "top": logits.argmax(-1) == tokens.answers,
        "preferred": right > wrong,
        "logit_diff": right - wrong,
        "probability": (right - logits.logsumexp(-1)).exp(),
    }
    assert by_hand.keys() == tokens.metrics().keys()
    for name, wanted in by_hand.items():
        assert torch.equal(found[name], t[name])
        torch.testing.assert_close(t[name].double(), wanted.double(), rtol=1e-4, atol=1e-4)
        assert getattr(scored, name) == pytest.approx(float(wanted.double().mean()), abs=1e-4)
