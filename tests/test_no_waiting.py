"""On an accelerator nothing waits within a forward pass: no value is read from the device, and none is sent there.

The device here is torch's meta device, on which to read a value is an error. What is sent there is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hooked_lm import HookedTransformer, HookPoint
from hooked_lm.interventions import Intervention
from hooked_lm.sweep import engine
from hooked_lm.sweep.plan import plan_cell
from hooked_lm.sweep.walk import SweepWalk
from tests.helpers import tiny_model

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary, grouped, gated, RMS": {
        "positional_embedding_type": "rotary",
        "d_model": 16,
        "d_head": 4,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "gated_mlp": True,
        "normalization_type": "RMS",
    },
    "dynamic rotary": {
        "positional_embedding_type": "rotary",
        "use_dynamic_rope": True,
        "dynamic_rope_factor": 2.0,
        "dynamic_rope_original_ctx_len": 4,
    },
    "alibi": {"positional_embedding_type": "alibi"},
    "window": {"window_size": 3},
    "shortformer, parallel": {"positional_embedding_type": "shortformer", "parallel_attn_mlp": True},
    "sinks, gates, caps": {
        "attention_sinks": True,
        "attention_gate": True,
        "output_logits_soft_cap": 3.0,
        "attn_scores_soft_cap": 2.0,
    },
    "bidirectional": {"attention_dir": "bidirectional"},
}
N = 7


class Sent(TorchDispatchMode):
    """The operations that send numbers from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim]
        results = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if any(one.is_cpu for one in tensors) and any(one.is_meta for one in results):
            self.operations.append(str(func))
        return result


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> HookedTransformer:
    """A model on the device, which has run before: tables that are kept are there."""
    made = tiny_model(**ARCHITECTURES[request.param])
    for module in made.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"))
    made.run_with_hooks(tokens(), fwd_hooks=[("*hook_pattern", look)])
    return made


def tokens(length: int = N) -> Tensor:
    return torch.zeros(2, length, dtype=torch.long, device="meta")


def look(x: Tensor, hook: HookPoint) -> None:
    pass


def watch(run: Callable[[], object]) -> list[str]:
    with Sent() as sent, torch.no_grad():
        run()
    return sent.operations


def test_the_counter_sees_what_is_sent_and_what_is_read() -> None:
    assert watch(lambda: torch.ones(3).to("meta")) != []
    assert watch(lambda: torch.full((3,), 2.0, device="meta")) == []
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros(1, device="meta").any())


def test_a_forward_pass(model: HookedTransformer) -> None:
    assert watch(lambda: model(tokens())) == []
    assert watch(lambda: model(tokens(), return_type="loss")) == []
    assert watch(lambda: model(tokens(), logits_to_keep=1)) == []


def test_caches_and_hooks(model: HookedTransformer) -> None:
    edits = [Intervention("blocks.0.hook_resid_pre", "scale", 2.0, pos=3), Intervention("blocks.1.attn.hook_z", "zero")]

    def edited() -> None:
        with model.intervening(edits):
            model.run_with_cache(tokens())

    assert watch(lambda: model.run_with_cache(tokens(), names_filter="*")) == []
    assert watch(edited) == []


def test_a_text_read_in_pieces(model: HookedTransformer) -> None:
    if model.cfg.attention_dir == "bidirectional" or model.cfg.use_dynamic_rope:
        pytest.skip("has no key-value cache, or one that ends at the original context")
    past = model.new_kv_cache(2, 10)
    model(tokens(3), past_kv_cache=past)
    assert watch(lambda: model(tokens(1), past_kv_cache=past)) == []
    assert watch(lambda: model(tokens(2), past_kv_cache=past)) == []


def test_a_walk(model: HookedTransformer) -> None:
    if model.cfg.attention_dir == "bidirectional":
        pytest.skip("has no walk")
    plans = [
        (Intervention(f"blocks.{layer}.hook_attn_out", "add", 1.0, pos=pos),) for layer in (0, 1) for pos in (1, 5)
    ]
    cells = [plan_cell(index, plan, model.cfg, N) for index, plan in enumerate(plans)]
    run = engine._Engine(
        model, tokens(), torch.ones(2, N, dtype=torch.long), lambda logits: logits[0, -1, 0], (), 2**30
    )
    base, _ = run.base_run(run.base_names([cell for cell in cells if cell]))
    walk = SweepWalk(model, base, [cell for cell in cells if cell], 0)
    assert watch(lambda: walk.run(lambda: None)) == []
