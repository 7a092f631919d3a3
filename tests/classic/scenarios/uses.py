"""What people build around a model: probes, autoencoders, wrappers, training, derivatives."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers, parameter, tokens
from tests.classic.scenario import Outcome, scenario

SITES = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.0.hook_attn_out")
INNER = ("blocks.1.attn.hook_z", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post", "blocks.0.attn.hook_q")


class Wrapper(torch.nn.Module):
    """A module in a hook point's place, as autoencoders are spliced in."""

    def __init__(self, point: Any) -> None:
        super().__init__()
        self.point = point

    def forward(self, x: Any) -> Any:
        return self.point(x.relu() * 0.7)


def _put(model: Any, name: str, module: Any) -> None:
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], module)


@scenario("plain")
def wrapped_hook_points(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    for name in (*SITES, *INNER):
        point = model.get_submodule(name)
        _put(model, name, Wrapper(point))
        model.setup()
        out[name] = model(tokens(1, 4))
        out[f"{name} is a point"] = name in model.hook_dict, f"{name}.point" in model.hook_dict
        halved = [(f"{name}.point", lambda value, hook: value * 0.5)]
        out[f"{name} with a hook"] = model.run_with_hooks(tokens(1, 4), fwd_hooks=halved)
        _put(model, name, point)
        model.setup()
    out["put back"] = model(tokens(1, 4))
    return out


@scenario("plain", "rotary")
def torch_hooks_on_points(lib: Library, model: Any) -> Outcome:
    out: Outcome = {}
    for name in (*SITES, *INNER):
        handle = model.get_submodule(name).register_forward_hook(lambda module, given, value: value * 0.6)
        out[name] = model(tokens(1, 4))
        handle.remove()
    out["removed"] = model(tokens(1, 4))
    return out


def _trained(parameters: list[Any], loss: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@scenario("plain", "llama")
def probe(lib: Library, model: Any) -> Outcome:
    """A linear probe trained on cached activations, several times through the same cache."""
    _, cache = model.run_with_cache(tokens(3, 5))
    weight = numbers("probe", (8, 2)).requires_grad_()
    target = tokens(3, 5, vocab=2, name="target")
    stream = cache["resid_post", 1]
    losses = _trained(
        [weight], lambda: torch.nn.functional.cross_entropy((stream @ weight).flatten(0, 1), target.flatten())
    )
    return {
        "weight": weight,
        "losses": {str(i): loss for i, loss in enumerate(losses)},
        "clean": model.W_E.grad is None,
    }


@scenario("plain")
def autoencoder(lib: Library, model: Any) -> Outcome:
    _, cache = model.run_with_cache(tokens(3, 5), names_filter="blocks.0.mlp.hook_post")
    given = cache["blocks.0.mlp.hook_post"]
    encoder, decoder = numbers("encoder", (12, 20)).requires_grad_(), numbers("decoder", (20, 12)).requires_grad_()

    def loss() -> Any:
        hidden = (given @ encoder).relu()
        return (hidden @ decoder - given).square().mean() + 0.01 * hidden.abs().mean()

    losses = _trained([encoder, decoder], loss)
    spliced = [("blocks.0.mlp.hook_post", lambda value, hook: (value @ encoder).relu() @ decoder)]
    return {
        "losses": {str(i): one for i, one in enumerate(losses)},
        "spliced": model.run_with_hooks(tokens(1, 4), fwd_hooks=spliced),
    }


@scenario("plain")
def interchange_training(lib: Library, model: Any) -> Outcome:
    """Activations of one run patched into another, which is trained: no gradient reaches the first."""
    _, cache = model.run_with_cache(tokens(2, 4, name="source"))
    kept = cache["resid_mid", 0]

    def patch(value: Any, hook: Any) -> Any:
        value[:, 1] = kept[:, 1]
        return value

    model.run_with_hooks(tokens(2, 4), return_type="loss", fwd_hooks=[("blocks.0.hook_resid_mid", patch)]).backward()
    return {
        "embedding": model.embed.W_E.grad,
        "positions": model.pos_embed.W_pos.grad,
        "W_in": model.blocks[0].mlp.W_in.grad,
    }


@scenario("plain", "attn_only", "llama", "experts")
def training(lib: Library, model: Any) -> Outcome:
    # Biases apart: gated MLPs and experts have more of them here.
    weights = [value for name, value in model.named_parameters() if not name.split(".")[-1].lstrip("_").startswith("b")]
    losses = _trained(weights, lambda: model(tokens(3, 5), return_type="loss"), steps=5)
    return {"losses": {str(i): loss for i, loss in enumerate(losses)}, "logits": model(tokens(1, 4))}


@scenario("plain", "rotary")
def second_derivatives(lib: Library, model: Any) -> Outcome:
    embedded = model.embed(tokens(1, 4)).detach().requires_grad_()

    def loss() -> Any:
        return model.run_with_hooks(
            tokens(1, 4), return_type="loss", fwd_hooks=[("hook_embed", lambda x, hook: embedded)]
        )

    (first,) = torch.autograd.grad(loss(), embedded, create_graph=True)
    (penalty,) = torch.autograd.grad(first.square().sum(), embedded)
    return {"gradient": first, "of its size": penalty}


@scenario("plain")
def functional(lib: Library, model: Any) -> Outcome:
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: Any) -> Any:
        return torch.func.functional_call(model, values, (tokens(2, 4),), {"return_type": "loss"})

    found = torch.func.grad(loss)(values)
    return {name: found[name] for name in ("embed.W_E", "blocks.0.attn.W_Q", "blocks.1.mlp.W_out", "unembed.W_U")}


@scenario("plain", "grouped")
def copies(lib: Library, model: Any) -> Outcome:
    other = copy.deepcopy(model)
    other.blocks[0].attn.W_Q.data *= 0.0
    _, cache = model.run_with_cache(tokens(1, 3))
    kept = copy.deepcopy(cache)
    cache["blocks.0.attn.hook_z"].mul_(0.0)
    return {"original": model(tokens(1, 4)), "changed": other(tokens(1, 4)), "cache": kept["z", 0]}


@scenario("plain", "llama", "gemma")
def double_precision(lib: Library, model: Any) -> Outcome:
    wide = model.to(torch.float64, print_details=False)
    return {"logits": wide(tokens(2, 5)), "dtype": str(wide.W_E.dtype), "in the config": str(wide.cfg.dtype)}


@scenario("plain")
def frozen_models(lib: Library, model: Any) -> Outcome:
    model.requires_grad_(False)
    direction = numbers("direction", (8,)).requires_grad_()
    hooks = [("blocks.1.hook_resid_pre", lambda value, hook: value + direction)]
    model.run_with_hooks(tokens(2, 4), return_type="loss", fwd_hooks=hooks).backward()
    return {"gradient": direction.grad, "none": model.embed.W_E.grad is None}


@scenario("plain")
def changed_weights(lib: Library, model: Any) -> Outcome:
    model.blocks[0].attn.W_O.data[1] = 0.0
    model.unembed.W_U.data = parameter("another.W_U", (8, 11))
    model.blocks[1].mlp.b_out.data += 1.0
    out: Outcome = {"logits": model(tokens(1, 4))}
    with torch.no_grad():
        model.W_E[3] += 1.0
        model.embed.W_E[4] = 0.0
    out["after"] = model(tokens(1, 4))
    return out


@scenario("plain", "llama")
def changed_configs(lib: Library, model: Any) -> Outcome:
    """The fields of a built model's config that act when they are assigned."""
    out: Outcome = {}
    model.cfg.output_logits_soft_cap = 1.5
    out["logits capped"] = model(tokens(1, 5))
    model.cfg.attn_scores_soft_cap = 0.5
    out["scores capped"] = model(tokens(1, 5))
    model.cfg.output_logits_soft_cap = model.cfg.attn_scores_soft_cap = -1.0
    out["neither"] = model(tokens(1, 5))
    return out


@scenario("text_plain", "text_rotary")
def steered_generation(lib: Library, model: Any) -> Outcome:
    direction = 4 * numbers("steering", (8,))
    hooks = [("blocks.1.hook_resid_pre", lambda value, hook: value + direction)]
    with model.hooks(fwd_hooks=hooks):
        found = model.generate(
            model.to_tokens("the cat"), max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
        )
    return {"steered": found}


@scenario(
    "plain", "rotary", "grouped", "attn_only", "experts", "shortformer", "gemma", "no_scale", "solu_ln", "clipped"
)
def saved_configs(lib: Library, model: Any) -> Outcome:
    fields = {name: value if _plain(value) else str(value) for name, value in model.cfg.to_dict().items()}
    return {
        "config": json.dumps(fields),
        "state": {name: list(value.shape) for name, value in model.state_dict().items()},
        "logits": model(tokens(2, 5)),
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list))


@scenario()
def half_precision(lib: Library) -> Outcome:
    left, right = numbers("left", (2, 5, 3)), numbers("right", (2, 3, 5))
    out: Outcome = {}
    for dtype in (torch.bfloat16, torch.float16):
        matrix = lib.FactoredMatrix(left.to(dtype), right.to(dtype))
        out[f"{dtype} eigenvalues"] = matrix.eigenvalues.abs().sort(-1).values.float()
    return out
