"""`torch.compile` takes the forward pass as one graph, and hooks that come later still run.

Run by test_compile.py in a process of its own, without the checks of shapes, which are no part of a graph.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint
from hooked_lm.components import linear as products
from tests.helpers import tiny_model, tiny_tokens
from tests.hook_sites_helpers import ARCHITECTURES

# One of each kind of positions, masks, norms and MLPs.
ONE_GRAPH = (
    *("gpt2", "attention only", "parallel", "grouped gated rms rotary", "shortformer", "alibi", "local", "soft caps"),
    *("folded, bidirectional", "qk LN with a gain per head, some layers rotate, scaled queries, tied, scaled logits"),
    *("gated attention, norms before and after", "a layer before the unembedding, no first norm"),
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, **{"backend": "aot_eager", "fullgraph": True, **options})


@torch.no_grad()
@pytest.mark.parametrize("architecture", ONE_GRAPH)
def test_the_forward_pass_is_one_graph_and_computes_the_same(architecture: str) -> None:
    fields = ARCHITECTURES[architecture]
    # A graph takes as long to make as it has layers, and one is enough where they are alike.
    alike = not any(isinstance(value, list) for value in fields.values())
    model = tiny_model(**fields, **({"n_layers": 1} if alike else {}))
    graph = compiled(model)
    for tokens in (tiny_tokens(), tiny_tokens(3, 9)):
        torch.testing.assert_close(graph(tokens), model(tokens), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("load", [HookedTransformer.from_pretrained, HookedTransformer.from_pretrained_no_processing])
def test_large_matrices_are_in_the_graph_too(load: Any, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LARGE", 1)
    model = load(str(gpt2_folder))
    graph = compiled(model)
    for tokens in (tiny_tokens(1, 1), tiny_tokens(1, 2), tiny_tokens(3, 9)):
        torch.testing.assert_close(graph(tokens), model(tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def test_experts_are_chosen_between_graphs() -> None:
    model = tiny_model(**ARCHITECTURES["mixture"])
    tokens = tiny_tokens()
    torch.testing.assert_close(compiled(model, fullgraph=False)(tokens), model(tokens), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"return_type": "loss"},
        {"stop_at_layer": 1},
        {"logits_to_keep": 2},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
        {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_are_those_of_the_model(options: dict[str, Any]) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model(tokens, **options)
    torch.testing.assert_close(compiled(model, fullgraph=False)(tokens, **options), expected, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_model() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    model(tokens, return_type="loss").backward()
    expected = model.blocks[0].attn.W_Q.grad.clone()
    model.zero_grad()
    compiled(model, fullgraph=False)(tokens, return_type="loss").backward()
    torch.testing.assert_close(model.blocks[0].attn.W_Q.grad, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_hooks_that_come_after_it_was_compiled_run_and_go() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    graph = compiled(model, fullgraph=False)
    plain = graph(tokens)
    seen: list[Tensor] = []

    def halve(x: Tensor, hook: HookPoint) -> None:
        seen.append(x.clone())
        x.mul_(0.5)

    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", halve)]):
        expected = model(tokens)
        torch.testing.assert_close(graph(tokens), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(graph(tokens), plain, rtol=0, atol=1e-10)
    _, cache = graph.run_with_cache(tokens)
    torch.testing.assert_close(cache["mlp_out", 0], seen[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's own backend needs a C++ compiler")
# Importing it uses a part of torch that torch says is old.
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
def test_torchs_own_backend_computes_the_same() -> None:
    model = tiny_model(**ARCHITECTURES["grouped gated rms rotary"], dtype=torch.float32)
    tokens = tiny_tokens()
    torch.testing.assert_close(compiled(model, backend="inductor")(tokens), model(tokens), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's own backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
def test_the_block_of_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs/howto/speed.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    model = HookedTransformer.from_pretrained("demo-tasks-4l")
    exec(block, {"torch": torch, "model": model, "prompts": ["Q: What is the capital of France?\nA:"]})
