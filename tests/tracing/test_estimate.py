"""What a trace is said to cost is what its passes take."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from hooked_lm.metrics import log_prob
from hooked_lm.tracing import Trace
from tests.helpers import tiny_model

WIDE: dict[str, Any] = {"d_model": 48, "n_heads": 4, "d_head": 12, "n_layers": 3, "n_ctx": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, grouped": {"gated_mlp": True, "n_key_value_heads": 2, "positional_embedding_type": "rotary"},
    "attention only": {"attn_only": True},
    "experts": {
        "gated_mlp": True,
        "num_experts": 4,
        "experts_per_token": 2,
        "d_expert": 20,
        "d_shared_expert": 28,
        "act_fn": "silu",
    },
}
PROMPTS = [list(range(1, 17)), list(range(2, 18)), list(range(3, 19))]


def counted(trace: Trace) -> int:
    with FlopCounterMode(display=False) as counter:
        trace.run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", [0, 2, None])
def test_operations_are_about_those_that_torch_counts(name: str, layer: int | None) -> None:
    # The counter looks for the graph of what needs gradients.
    trace: Trace = tiny_model(**WIDE, **CONFIGS[name]).requires_grad_(False).trace(run=False)
    run = trace.prompts(PROMPTS)
    part = run.logits if layer is None else run["resid_post", layer]
    part.at(pos=-1).save("x")
    assert trace.estimate().flops == pytest.approx(counted(trace), rel=0.15)


def test_gradients_take_three_times_as_much() -> None:
    model = tiny_model(**WIDE)
    plain, differentiated = (model.trace(run=False) for _ in range(2))
    plain.prompts(PROMPTS).logits.at(pos=-1).save("x")
    run = differentiated.prompts(PROMPTS)
    differentiated.gradient(run.metric(log_prob(3)).sum(), of=run["resid_pre", 0]).save("x")
    assert differentiated.estimate().flops == pytest.approx(3 * plain.estimate().flops, rel=0.01)
