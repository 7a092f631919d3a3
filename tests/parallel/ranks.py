"""Run a function in several processes of one group, and what such a process compares with a whole model."""

from __future__ import annotations

import datetime
import json
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, metrics, parallel
from hooked_lm.components.ranks import Ranks

__all__ = ["differences", "in_ranks"]

TIMEOUT = datetime.timedelta(seconds=60)


def in_ranks(size: int, folder: Path, function: Callable[..., Any], *args: object) -> list[Any]:
    """Return what a function of this package's tests returns in each of several gloo processes.

    Args:
        size: how many.
        folder: an empty one.
        function: called with the folder and the arguments; returns plain data.
        *args: plain data.
    """
    store = folder / "store"
    torch.multiprocessing.spawn(_rank, (size, str(store), str(folder), function, args), nprocs=size)  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _rank(
    rank: int, size: int, store: str, folder: str, function: Callable[..., Any], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        found = function(Path(folder), *args)
    except BaseException:
        found = ["failed", traceback.format_exc()]
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        raise
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Its work is done and written. As the interpreter ends, torch may take down threads of its own that still run,
    # which aborts the process now and then ("terminate called without an active exception").
    os._exit(0)


def whole(ranks: Ranks, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ranks.whole_parameter(name, one) for name, one in found.items()}


def differences(model: HookedTransformer, tokens: Tensor) -> list[str]:
    """Return in what a model that is shared out differs from the whole one, in float64 beyond 1e-10."""
    part = parallel.shard(model)
    assert part.ranks is not None
    found = []
    for (name, expected), (_, came) in zip(results(model, tokens), results(part, tokens), strict=True):
        if isinstance(came, Exception) or isinstance(expected, Exception):
            if type(came) is not type(expected):
                found.append(f"{name}: {came!r}, in one process {expected!r}"[:400])
            continue
        found += [f"{name}: {fault}" for fault in _unequal(came, expected)]
    return found


def _unequal(came: Any, expected: Any) -> Iterator[str]:
    if isinstance(expected, dict):
        if came.keys() != expected.keys():
            yield f"there are {sorted(set(came) ^ set(expected))[:4]}"
            return
        for name, one in expected.items():
            yield from (f"{name} {fault}" for fault in _unequal(came[name], one))
    elif came.shape != expected.shape:
        yield f"shape {tuple(came.shape)} and {tuple(expected.shape)}"
    elif not torch.allclose(came.to(expected), expected, rtol=1e-10, atol=1e-10, equal_nan=True):
        yield f"off by {float((came - expected).abs().max()):.2g}"


def results(model: HookedTransformer, tokens: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield what is compared, by name."""
    for name, work in WORK.items():
        try:
            yield name, work(model, tokens)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            yield name, error


def cached(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    names = [name for name, point in model.hook_dict.items() if point.differentiable]
    with torch.no_grad():
        return dict(model.run_with_cache(tokens, attention_mask=mask, names_filter=names)[1])


def edited(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """Logits under edits of single heads, neurons, keys and patterns."""
    found = {}
    with torch.no_grad():
        for site, fields in EDITS.items():
            for layer in range(model.cfg.n_layers):
                name = f"blocks.{layer}.{site}"
                if name not in model.hook_dict:
                    continue
                edit = Intervention(name, "scale", 1.7, **fields)
                found[name] = model.run(tokens, interventions=[edit])
    return found


EDITS: dict[str, dict[str, Any]] = {
    "attn.hook_z": {"head": -1, "pos": 1},
    "attn.hook_q": {"head": -1},
    "attn.hook_k": {"head": -1},
    "attn.hook_v": {"head": 0},
    "attn.hook_pattern": {"head": -1, "pos": -1},
    "attn.hook_result": {"head": 0},
    "hook_q_input": {"head": -1},
    "hook_v_input": {"head": 0},
    "hook_attn_in": {"head": 0},
    "mlp.hook_post": {"feature": -1},
    "mlp.hook_pre": {"feature": 0},
    "hook_attn_out": {"pos": 0},
}
SITES = ("attn.hook_z", "attn.hook_k", "attn.hook_pattern", "attn.hook_rot_q", "mlp.hook_post", "hook_attn_out")


def gradients(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """Of all parameters, whole."""
    model.zero_grad()
    model(tokens, return_type="loss").backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found if model.ranks is None else whole(model.ranks, found)


def hooked_gradients(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """Of activations, by backward hooks, one of which edits; and of the parameters below."""
    kept: dict[str, Tensor] = {}
    names = [f"blocks.{layer}.{site}" for layer in range(model.cfg.n_layers) for site in SITES]
    names = [name for name in names if name in model.hook_dict]

    def keep(grad: Tensor, hook: Any) -> None:
        kept[hook.name] = grad.clone()

    def halve(grad: Tensor, hook: Any) -> Tensor:
        changed = grad.clone()
        changed[..., 0, :] *= 0.5
        return changed

    model.zero_grad()
    with model.hooks(bwd_hooks=[(names, keep), ("blocks.0.attn.hook_z", halve)]):
        model(tokens, return_type="loss").backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {**kept, **(found if model.ranks is None else whole(model.ranks, found))}


def continued(model: HookedTransformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        past = model.new_kv_cache(tokens.shape[0])
        model(tokens[:, :3], past_kv_cache=past)
        logits: Tensor = model(tokens[:, 3:], past_kv_cache=past)
    return logits


def generated(model: HookedTransformer, tokens: Tensor) -> Tensor:
    made = model.generate(tokens[:, :3], max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert isinstance(made, Tensor)
    return made


def traced(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    last = model.cfg.n_layers - 1
    with model.trace() as t:
        source, target = t.prompts(tokens[:1]), t.prompts(tokens[1:, :-1])
        target["z", 0].at(pos=-1, head=0).replace(source["z", 0].at(pos=-1, head=0))
        score = target.metric(metrics.log_prob(3))
        score.save("score")
        t.gradient(score.sum(), of=[target["z", last].at(pos=-1)])[0].save("gradient")
        source["k", last].at(pos=-1).save("keys")
        t.weight("blocks.0.attn.W_O").sum().save("weight")
    return dict(t.results or {})


WORK: dict[str, Callable[[HookedTransformer, Tensor], Any]] = {
    "logits": lambda model, tokens: model(tokens).detach(),
    "cache": cached,
    "edits": edited,
    "gradients": gradients,
    "gradients under hooks": hooked_gradients,
    "key-value cache": continued,
    "generation": generated,
    "trace": traced,
}
