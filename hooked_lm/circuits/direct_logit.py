"""Direct logit attribution: a logit as a sum of what each part of the model writes in its direction.

Everything that is written to the residual stream adds up to it, and the logits read it: so a logit is a sum over
components, heads, neurons or source positions (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits";
for a difference of two logits Wang et al. 2022, "Interpretability in the Wild"). Norms on the way, the final one first
of all, are linear once their scales are held at what they were in the run. With direction `u = W_U[:, token]`, final
norm `(x - mean) / scale * w + b` and `r = centred(w * u) / scale`, the logit is `x . r + b . u + b_U[token]`.

Only the direct path counts here: what a head writes for later heads to read is counted with those later heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hooked_lm.activation_cache import ActivationCache
from hooked_lm.circuits.attribution_parts import LogitParts, RecordedRun
from hooked_lm.circuits.attribution_result import LogitAttribution, Split
from hooked_lm.components.norm import Norm
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name

__all__ = ["LogitAttribution", "Split", "TokenInput", "hooks_for_attribution", "logit_attribution"]

TokenInput = str | int | Sequence[str] | Sequence[int] | Tensor


def hooks_for_attribution(
    model: HookedModel, split: Split = "component", layers: Sequence[int] | None = None
) -> list[str]:
    """Return the names of the activations that `logit_attribution` needs, for `names_filter=`.

    Args:
        model: a `HookedTransformer`.
        split, layers: as they will be given to `logit_attribution`.
    """
    chosen, cfg = _split_layers(model, split, layers), model.cfg
    names = ["hook_embed", *(["hook_pos_embed"] if cfg.positional_embedding_type == "standard" else [])]
    for layer in range(cfg.n_layers):
        names += [get_act_name(site, layer) for site in ("attn_out", "mlp_out")[: 1 if cfg.attn_only else 2]]
    by_source = ("v", "pattern", "gate") if cfg.attention_gate else ("v", "pattern")
    inside = {"component": (), "head": ("z",), "neuron": ("post",), "source": by_source}[split]
    names += [get_act_name(site, layer) for layer in chosen for site in inside]
    after = "ln2_post" if split == "neuron" else "ln1_post"
    norms = [(f"blocks.{layer}.{after}", getattr(model.blocks[layer], after)) for layer in chosen]
    if cfg.norm_placement == "residual":
        on_stream = ("ln1",) if cfg.attn_only else ("ln1", "ln2")
        norms += [
            (f"blocks.{layer}.{ln}", getattr(block, ln)) for layer, block in enumerate(model.blocks) for ln in on_stream
        ]
    norms.append(("ln_final", model.ln_final))
    names += [f"{name}.hook_scale" for name, norm in norms if isinstance(norm, Norm)]
    names += ["unembed.hook_in"] if cfg.output_logits_soft_cap > 0 else []
    return [*names, "unembed.hook_out"]


@torch.no_grad()
def logit_attribution(
    cache: ActivationCache,
    tokens: TokenInput,
    incorrect_tokens: TokenInput | None = None,
    *,
    pos: int | Int[Tensor, " batch"] = -1,
    split: Split = "component",
    layers: Sequence[int] | None = None,
    before_soft_cap: bool = False,
    precision: float | None = None,
) -> LogitAttribution:
    """Return a logit at a position, or a difference of two, as a sum over the parts of the model.

    Splits; in each, the embeddings and those biases that no other part includes are separate parts:

    - `"component"`: embeddings, and what attention and MLP of each layer add (their biases included).
    - `"head"`: attention into its heads and `b_O`.
    - `"source"`: each head further, into the positions that it attends to: pattern times value, `b_V` included,
      and times the head's gate where it has one.
    - `"neuron"`: MLPs into their neurons and `b_out`.

    Norms on what is written, or on the stream, have their scales held fixed like the final one, and their biases are
    parts. Nothing of size [head d_model] or [neuron d_model] per position is formed.

    Args:
        cache: of a run without interventions between the parts and the logit. `hooks_for_attribution` returns the
            names of the activations that it has to hold.
        tokens: the token whose logit is split, as string or number; or one for each prompt, in a list or a tensor
            [batch].
        incorrect_tokens: likewise; their logits are subtracted.
        pos: the position of the logits; or one for each prompt, [batch]. Negative counts from the end.
        split: into which parts, see above.
        layers: split only these layers' attention or MLP, and leave the others whole; by default all.
        before_soft_cap: split the logit before the soft-cap. That is the logit itself where there is no soft-cap.
        precision: the relative precision of the run, by which float error in the sum is judged; by default that of the
            weights. Use `2**-10` for a float32 model that ran in TF32.

    Raises:
        ValueError: logits are soft-capped, so that no sum of parts equals them (pass `before_soft_cap=True`); neurons
            of a mixture of experts or of a model without MLPs; a token, position or layer out of range; a position
            that is padding in some prompt; an overridden unembedding, or one with a layer before it
            (`unembed_act_fn`); or parts that do not sum to the logit, because a hook changed the run or another
            component is overridden.
        UnknownHookError: the cache lacks an activation.
    """
    model = cast("HookedModel", cache.model)
    chosen = _split_layers(model, split, layers)
    if model.cfg.output_logits_soft_cap > 0 and not before_soft_cap:
        raise ValueError(
            f"this model's logits are soft-capped at {model.cfg.output_logits_soft_cap}, and a capped logit is no sum "
            "of parts; pass before_soft_cap=True to split the logit before the cap"
        )
    # What happens to the logits after `unembed.hook_out` is not in the cache, so the check of the sum cannot see it.
    reason = not_stock(model.unembed, name="unembed") or not_stock(cast("nn.Module", model), alone=True)
    if reason is not None:
        raise ValueError(
            f"logit attribution takes the stock unembedding: a component computes something else ({reason})"
        )
    model.unembed.require_linear("logit attribution")
    run = RecordedRun(cache, pos, precision)
    right = _tokens(model, tokens, run.batch)
    wrong = None if incorrect_tokens is None else _tokens(model, incorrect_tokens, run.batch)
    logit = run.logit(right) if wrong is None else run.logit(right) - run.logit(wrong)
    parts = LogitParts(run)
    direction = parts.unembed(right, wrong)
    for layer, block in reversed(list(enumerate(model.blocks))):
        direction = parts.add_layer(layer, block, direction, split if layer in chosen else "component")
    parts.add_embeddings(direction)
    off = run.require_equal("the parts sum to", parts.total(), logit, parts.size + logit.abs())
    return parts.finished(logit, split, chosen, off)


# Checks of the arguments


def _split_layers(model: HookedModel, split: str, layers: Sequence[int] | None) -> list[int]:
    """The layers that are taken apart, in order."""
    if split not in get_args(Split):
        raise ValueError(f"split is one of {', '.join(get_args(Split))}, not {split!r}")
    if split == "component":
        if layers is not None:
            raise ValueError("layers says which layers to take apart, and a split by component takes none apart")
        return []
    n_layers = model.cfg.n_layers
    chosen = list(range(n_layers)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ValueError(f"layers are some of 0-{n_layers - 1}, got {layers!r}")
    if split == "neuron":
        if model.cfg.attn_only:
            raise ValueError("this model is attention-only: it has no neurons")
        experts = [layer for layer in chosen if model.cfg.adds_experts(layer)]
        if experts:
            raise ValueError(
                f"layers {experts} add the output of experts, whose neurons are not recorded: split by component, or "
                "give the layers with plain MLPs as layers="
            )
    return chosen


def _tokens(model: HookedModel, tokens: TokenInput, batch: int) -> Int[Tensor, " batch"]:
    """One token for each prompt."""
    if isinstance(tokens, (list, tuple)):
        numbers = [model.to_single_token(one) if isinstance(one, str) else int(one) for one in tokens]
        index = torch.tensor(numbers, dtype=torch.long)
    elif isinstance(tokens, str):
        index = torch.tensor(model.to_single_token(tokens))
    else:
        index = torch.as_tensor(tokens)
    limit = model.cfg.d_vocab_out
    if index.is_floating_point() or index.dtype == torch.bool or tuple(index.shape) not in ((), (batch,)):
        raise ValueError(f"tokens are one token, or one for each of {batch} prompts, got {tokens!r}")
    if int(index.min()) < 0 or int(index.max()) >= limit:
        raise ValueError(f"tokens are 0-{limit - 1}, got {tokens!r}")
    return index.to(model.W_U.device, torch.long).expand(batch)
