"""Direct logit attribution: a logit as a sum of what each part of the model writes in its direction.

Everything that is written to the residual stream adds up to it, and the logits read it: so a logit is a sum over
components, heads, neurons or source positions (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits";
for a difference of two logits Wang et al. 2022, "Interpretability in the Wild"). Norms on the way, the final one first
of all, are linear once their scales are held at what they were in the run. With direction `u = W_U[:, token]`, final
norm `(x - mean) / scale * w + b` and `r = centred(w * u) / scale`, the logit is `x . r + b . u + b_U[token]`.

Only the direct path counts here: what a head writes for later heads to read shows up as theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm.activation_cache import ActivationCache
from hooked_lm.components.activations import soft_cap
from hooked_lm.components.norm import Norm
from hooked_lm.names import get_act_name

Split = Literal["component", "head", "neuron", "source"]
TokenInput = str | int | Sequence[str] | Sequence[int] | Tensor

_GRID_AXES: dict[str, tuple[str, ...]] = {
    "component": (),
    "head": ("layer", "head"),
    "neuron": ("layer", "neuron"),
    "source": ("layer", "head", "key"),
}
# A sum counts as exact when it is off by less than so many roundings of the largest that its terms could be.
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part adds to a logit, or to a difference of two.

    Attributes:
        values: the parts, [component batch]. They sum to `logit`. First the grid, if the split has one, then the rest.
        logit: what they sum to, as the model computed it, [batch].
        split: `"component"`, `"head"`, `"neuron"` or `"source"`.
        layers: the layers that were split, in the order of the grid.
        grid_shape: the lengths of the grid's axes: [layer head], [layer neuron] or [layer head key].
        rest_labels: of the parts after the grid.
        off: how far the sum was from the logit, at most.
    """

    values: Float[Tensor, "component batch"]
    logit: Float[Tensor, " batch"]
    split: str
    layers: tuple[int, ...]
    grid_shape: tuple[int, ...]
    rest_labels: tuple[str, ...]
    off: float

    @property
    def grid(self) -> Float[Tensor, "layer *part batch"]:
        """The split parts: [layer head batch], [layer neuron batch] or [layer head key batch].

        Raises:
            ValueError: the split is by component, which has no grid.
        """
        if not self.grid_shape:
            raise ValueError("a split by component has no grid: look at values and labels")
        return self.values[: self._grid_size()].unflatten(0, self.grid_shape)

    @property
    def rest(self) -> Float[Tensor, "component batch"]:
        """The parts that were not split: embeddings, other layers' outputs, biases. In the order of `rest_labels`."""
        return self.values[self._grid_size() :]

    @property
    def labels(self) -> list[str]:
        """A name for each part: `"embed"`, `"0_attn_out"`, `"L0H1"`, `"L0N7"`, `"L0H1<3"` (source 3), `"0_b_O"`."""
        return [self.label(index) for index in range(len(self.values))]

    def label(self, index: int) -> str:
        """Return the name of one part.

        Raises:
            IndexError: there is no such part.
        """
        if not 0 <= index < len(self.values):
            raise IndexError(f"no part {index}: there are parts 0-{len(self.values) - 1}")
        if index >= self._grid_size():
            return self.rest_labels[index - self._grid_size()]
        *outer, last = self.grid_shape
        index, inner = divmod(index, last)
        if self.split == "source":
            layer, head = divmod(index, outer[1])
            return f"L{self.layers[layer]}H{head}<{inner}"
        return f"L{self.layers[index]}{'H' if self.split == 'head' else 'N'}{inner}"

    def top(self, k: int = 10, prompt: int | None = None) -> list[tuple[str, float]]:
        """Return the `k` parts that matter most, up or down, as (label, value); fewer where there are fewer.

        Args:
            k: how many.
            prompt: of this prompt; by default by their mean over prompts.

        Raises:
            ValueError: `k` is below 1, or there is no such prompt.
        """
        if k < 1 or (prompt is not None and not 0 <= prompt < len(self.logit)):
            raise ValueError(f"k is at least 1 and prompt in 0-{len(self.logit) - 1}; got k={k}, prompt={prompt}")
        values = self.values.mean(-1) if prompt is None else self.values[:, prompt]
        best = values.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.label(index), float(values[index])) for index in best]

    def table(self, k: int = 10, prompt: int | None = None) -> str:
        """Return the `k` parts that matter most, what all others add, and the logit, as text.

        Args:
            k: how many.
            prompt: of this prompt; by default by their mean over prompts.

        Raises:
            ValueError: as `top`.
        """
        top = self.top(k, prompt)
        logit = float(self.logit.mean() if prompt is None else self.logit[prompt])
        lines = [*top, ("all others", logit - sum(value for _, value in top)), ("sum", logit)]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {value:+.4f}" for label, value in lines)

    def __str__(self) -> str:
        return self.table()

    def _grid_size(self) -> int:
        return len(self.values) - len(self.rest_labels)


def hooks_for_attribution(model: Any, split: Split = "component", layers: Sequence[int] | None = None) -> list[str]:
    """Return the names of the activations that `logit_attribution` needs, for `names_filter=`.

    Args:
        model: a `HookedTransformer`.
        split, layers: as they will be given to `logit_attribution`.
    """
    chosen, cfg = _split_layers(model, split, layers), model.cfg
    names = ["hook_embed", *(["hook_pos_embed"] if cfg.positional_embedding_type == "standard" else [])]
    for layer in range(cfg.n_layers):
        names += [get_act_name(site, layer) for site in ("attn_out", "mlp_out")[: 1 if cfg.attn_only else 2]]
    inside = {"component": (), "head": ("z",), "neuron": ("post",), "source": ("v", "pattern")}[split]
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

    Splits, each with the embeddings and all biases that its other parts leave over as parts of their own:

    - `"component"`: embeddings, and what attention and MLP of each layer add (their biases included).
    - `"head"`: attention into its heads and `b_O`.
    - `"source"`: each head further, into the positions that it attends to: pattern times value, `b_V` included.
    - `"neuron"`: MLPs into their neurons and `b_out`.

    Norms on what is written, or on the stream, have their scales held fixed like the final one, and their biases are
    parts. Nothing of size [head d_model] or [neuron d_model] per position is formed.

    Args:
        cache: of a run under no intervention on the way from the parts to the logit. What has to be in it,
            `hooks_for_attribution` says.
        tokens: whose logit: a token as string or number; or one for each prompt, in a list or a tensor [batch].
        incorrect_tokens: the same; their logits are subtracted.
        pos: the position whose logits they are; or one for each prompt, [batch]. Negative counts from the end.
        split: by what.
        layers: split only these layers' attention or MLP, and leave the others whole; by default all.
        before_soft_cap: split the logit before the soft-cap. That is the logit itself where there is no soft-cap.
        precision: the relative precision that the run computed in, for what counts as float error in the sum; by
            default that of the weights. Say `2**-10` of a float32 model that ran in TF32.

    Raises:
        ValueError: logits are soft-capped, which no sum survives (pass `before_soft_cap=True`); neurons of a mixture of
            experts or of a model without MLPs; a token, position or layer out of range; or parts that do not sum to
            the logit, because something changed the run on the way.
        UnknownHookError: the cache lacks an activation.
    """
    model = cast(Any, cache.model)
    chosen = _split_layers(model, split, layers)
    if model.cfg.output_logits_soft_cap > 0 and not before_soft_cap:
        raise ValueError(
            f"this model's logits are soft-capped at {model.cfg.output_logits_soft_cap}, and a capped logit is no sum "
            "of parts; pass before_soft_cap=True to split the logit before the cap"
        )
    run = _Run(cache, pos, precision)
    right = _tokens(model, tokens, run.batch)
    wrong = None if incorrect_tokens is None else _tokens(model, incorrect_tokens, run.batch)
    logit = run.logit(right) if wrong is None else run.logit(right) - run.logit(wrong)
    parts = _Parts(run)
    direction = parts.unembed(right, wrong)
    for layer, block in reversed(list(enumerate(model.blocks))):
        direction = parts.add_layer(layer, block, direction, split if layer in chosen else "component")
    parts.add_embeddings(direction)
    off = run.require_equal("the parts sum to", parts.total(), logit, parts.size + logit.abs())
    return parts.finished(logit, split, chosen, off)


class _Run:
    """A cached run at one position of each prompt: activations [batch ...] in a precision that sums can be taken in.

    Args:
        cache: of the run.
        pos: the position, or one for each prompt.
        precision: what the run's numbers are good for; None for what their dtype can hold.
    """

    def __init__(self, cache: ActivationCache, pos: int | Int[Tensor, " batch"], precision: float | None) -> None:
        if precision is not None and not 0 < precision < 1:
            raise ValueError(f"precision is relative, between 0 and 1, got {precision}")
        self.cache, self.model = cache, cast(Any, cache.model)
        W_U = self.model.unembed.W_U
        self.device = W_U.device
        self.half = W_U.dtype in (torch.float16, torch.bfloat16)
        self.eps = torch.finfo(W_U.dtype).eps if precision is None else precision
        self.batch, self.n_pos = self.whole("unembed.hook_out").shape[:2]
        self.pos = self._checked_pos(pos)
        self.prompts = torch.arange(self.batch, device=self.device)

    def _checked_pos(self, pos: int | Tensor) -> Int[Tensor, " batch"]:
        index = torch.as_tensor(pos, device=self.device)
        if index.is_floating_point() or index.dtype == torch.bool or tuple(index.shape) not in ((), (self.batch,)):
            raise ValueError(f"pos is a position, or one for each of {self.batch} prompts, got {pos!r}")
        if int(index.min()) < -self.n_pos or int(index.max()) >= self.n_pos:
            raise ValueError(f"pos {pos!r} is out of range: the cached logits have {self.n_pos} positions")
        return (index % self.n_pos).expand(self.batch)

    def exact(self, x: Tensor) -> Tensor:
        """Half precision as float32."""
        return x.float() if self.half else x

    def whole(self, name: str) -> Tensor:
        """An activation with its batch axis."""
        x = self.cache[name]
        return x if self.cache.has_batch_dim else x[None]

    def at(self, name: str, axis: int = 1) -> Tensor:
        """An activation at the position, [batch ...]; `axis` is that of the positions."""
        x = self.whole(name).movedim(axis, 1)
        if x.shape[1] != self.n_pos:
            raise ValueError(
                f"{name!r} has {x.shape[1]} positions in this cache and the logits {self.n_pos}: record the run "
                "without logits_to_keep"
            )
        return self.exact(x[self.prompts.to(x.device), self.pos.to(x.device)].to(self.device))

    def logit(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The model's own logit; before the soft-cap, where there is one."""
        logit = self.at("unembed.hook_out")[self.prompts, tokens]
        cfg, unembed = self.model.cfg, self.model.unembed
        cap = cfg.output_logits_soft_cap
        if cap <= 0:
            return logit
        # The cap cannot be undone where it has rounded to its limit, so the logit before it is computed again.
        direction, bias = self.exact(unembed.W_U[:, tokens].mT), self.exact(unembed.b_U[tokens])
        stream = self.at("unembed.hook_in")
        uncapped = ((stream * direction).sum(-1) + bias) * cfg.logit_scale
        size = (stream * direction).abs().sum(-1) * cfg.logit_scale + cap
        self.require_equal("the logit computed again from unembed.hook_in is", soft_cap(uncapped, cap), logit, size)
        return uncapped

    def require_equal(self, what: str, came: Tensor, expected: Tensor, size: Tensor) -> float:
        """Return how far `came` [batch] is from `expected`, at most.

        Args:
            what: said of the numbers that came, in an error.
            came, expected: the numbers, [batch].
            size: how large the terms could be, for what rounding explains, [batch].

        Raises:
            ValueError: they differ by more than rounding.
        """
        off, allowed = (came - expected).abs(), _ROUNDINGS * self.eps * size
        if not bool((off <= allowed).all()):
            worst = int((off - allowed).nan_to_num(float("inf")).argmax())
            raise ValueError(
                f"{what} {float(came[worst]):.6g} where the model has {float(expected[worst]):.6g} (prompt "
                f"{worst}): off by {float(off[worst]):.3g}, and float error explains {float(allowed[worst]):.1g}. A "
                "hook or intervention changed the run in between, the weights are not those of the run, or it ran in "
                "less precision than the weights have (then say precision=)"
            )
        return float(off.max())


class _Parts:
    """The parts of a logit as they are found, from the end of the model to its start.

    Attributes:
        size: what the parts could be at most if all pointed the same way, for the float error of their sum, [batch].
    """

    def __init__(self, run: _Run) -> None:
        self.run, self.model = run, run.model
        self.grids: list[Tensor] = []  # per split layer, the last first, [*part batch]
        self.rest: list[tuple[str, Tensor]] = []  # the last first
        self.biases: list[tuple[str, Tensor]] = []
        self.size = torch.zeros(run.batch, device=run.device)

    def unembed(
        self, right: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch d_model"]:
        """Take in the biases at the end; return the direction in which the logit reads the stream there."""
        unembed, exact = self.model.unembed, self.run.exact
        direction, bias = exact(unembed.W_U[:, right].mT), exact(unembed.b_U[right])
        if wrong is not None:
            direction, bias = direction - exact(unembed.W_U[:, wrong].mT), bias - exact(unembed.b_U[wrong])
        self._add_bias("unembed.b_U", bias * self.model.cfg.logit_scale)
        return self._before(self.model.ln_final, "ln_final", direction * self.model.cfg.logit_scale)

    def add_layer(
        self, layer: int, block: Any, direction: Float[Tensor, "batch d_model"], split: str
    ) -> Float[Tensor, "batch d_model"]:
        """Take in what a layer writes; return the direction in which the stream before it is read."""
        norms_stream = self.model.cfg.norm_placement == "residual"
        if not self.model.cfg.attn_only:
            if norms_stream:
                direction = self._before(block.ln2, f"{layer}_ln2", direction)
            self._add_write("mlp_out", layer, direction, split=split == "neuron")
            if split == "neuron":
                self._add_neurons(layer, block, direction)
        if norms_stream:
            direction = self._before(block.ln1, f"{layer}_ln1", direction)
        self._add_write("attn_out", layer, direction, split=split in ("head", "source"))
        if split in ("head", "source"):
            self._add_heads(layer, block, direction, by_source=split == "source")
        return direction

    def add_embeddings(self, direction: Float[Tensor, "batch d_model"]) -> None:
        """Take in what the stream starts with."""
        # Shortformer's positions never enter the stream.
        if self.model.cfg.positional_embedding_type == "standard":
            self._add_read("pos_embed", self.run.at("hook_pos_embed"), direction)
        self._add_read("embed", self.run.at("hook_embed"), direction)

    # One thing that is written

    def _add_write(self, site: str, layer: int, direction: Float[Tensor, "batch d_model"], split: bool) -> None:
        """Take in all of what attention or MLP adds; if it is to be split, only how large it could be."""
        written = self.run.at(get_act_name(site, layer))
        if split:
            self._grow(written, direction)
        else:
            self._add_read(f"{layer}_{site}", written, direction)

    def _add_read(self, label: str, written: Tensor, direction: Float[Tensor, "batch d_model"]) -> None:
        self.rest.append((label, (written * direction).sum(-1)))
        self._grow(written, direction)

    def _grow(self, written: Tensor, direction: Float[Tensor, "batch d_model"]) -> None:
        self.size = self.size + written.norm(dim=-1) * direction.norm(dim=-1)

    def _add_bias(self, label: str, bias: Float[Tensor, " batch"]) -> None:
        self.biases.append((label, bias))
        self.size = self.size + bias.abs()

    def _before(
        self, norm: nn.Module, label: str, direction: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """Return the direction before a norm that is read in `direction` after it; its bias is a part."""
        if not isinstance(norm, Norm):
            return direction
        if norm.b is not None:
            self._add_bias(f"{label}.b", direction @ self.run.exact(norm.b))
        before = direction if norm.w is None else direction * self.run.exact(norm.w)
        before = before / self.run.at(norm.hook_scale.name)
        # (x - mean) . r  =  x . (r - mean)
        return before - before.mean(-1, keepdim=True) if norm.centred else before

    # One layer, taken apart

    def _add_heads(self, layer: int, block: Any, direction: Float[Tensor, "batch d_model"], by_source: bool) -> None:
        run, n_biases = self.run, len(self.biases)
        inside = self._before(block.ln1_post, f"{layer}_ln1_post", direction)
        self._add_bias(f"{layer}_b_O", inside @ run.exact(block.attn.b_O))
        # How each head's z is read: [batch head d_head], never the heads' writes themselves.
        onto = einsum(run.exact(block.attn.W_O), inside, "head d_head d_model, batch d_model -> batch head d_head")
        if by_source:
            parts = self._sources(layer, onto)
        else:
            z = run.at(get_act_name("z", layer))
            parts = einsum(z, onto, "batch head d_head, batch head d_head -> head batch")
        self._add_grid(f"{layer}_attn_out", parts, n_biases, direction)

    def _sources(self, layer: int, onto: Float[Tensor, "batch head d_head"]) -> Float[Tensor, "head key batch"]:
        run = self.run
        pattern = run.at(get_act_name("pattern", layer), axis=2)  # [batch head key]
        v = run.exact(run.whole(get_act_name("v", layer)).to(run.device))
        if v.shape[1] != pattern.shape[-1]:
            raise ValueError(
                f"layer {layer} attends to {pattern.shape[-1]} positions, and the cache has values of {v.shape[1]}: "
                "record the run without pos_slice and without a key-value cache"
            )
        grouped = rearrange(onto, "batch (kv_head group) d_head -> batch kv_head group d_head", kv_head=v.shape[2])
        read = einsum(v, grouped, "batch key kv_head d_head, batch kv_head group d_head -> batch kv_head group key")
        read = rearrange(read, "batch kv_head group key -> batch (kv_head group) key")
        return einsum(pattern, read, "batch head key, batch head key -> head key batch")

    def _add_neurons(self, layer: int, block: Any, direction: Float[Tensor, "batch d_model"]) -> None:
        run, n_biases = self.run, len(self.biases)
        inside = self._before(block.ln2_post, f"{layer}_ln2_post", direction)
        self._add_bias(f"{layer}_b_out", inside @ run.exact(block.mlp.b_out))
        onto = einsum(run.exact(block.mlp.W_out), inside, "d_mlp d_model, batch d_model -> batch d_mlp")
        post = run.at(get_act_name("post", layer))
        parts = einsum(post, onto, "batch d_mlp, batch d_mlp -> d_mlp batch")
        self._add_grid(f"{layer}_mlp_out", parts, n_biases, direction)

    def _add_grid(
        self, whole: str, parts: Float[Tensor, "*part batch"], n_biases: int, direction: Float[Tensor, "batch d_model"]
    ) -> None:
        """Take in a layer's parts, which with the biases after the first `n_biases` are what the layer writes."""
        layer, _, site = whole.partition("_")
        written = self.run.at(get_act_name(site, int(layer)))
        flat = parts.reshape(-1, parts.shape[-1])
        total = flat.sum(0) + sum(bias for _, bias in self.biases[n_biases:])
        self.size = self.size + flat.abs().sum(0)
        size = written.norm(dim=-1) * direction.norm(dim=-1) + flat.abs().sum(0)
        self.run.require_equal(f"the parts of {whole} sum to", total, (written * direction).sum(-1), size)
        self.grids.append(parts)

    # All together

    def _in_order(self) -> tuple[list[str], list[Tensor]]:
        """What is not in the grid: as written, from first to last, then the biases."""
        pairs = [*reversed(self.rest), *reversed(self.biases)]
        return [label for label, _ in pairs], [value for _, value in pairs]

    def total(self) -> Float[Tensor, " batch"]:
        """Return the sum of all parts."""
        grids = [grid.reshape(-1, self.run.batch).sum(0) for grid in self.grids]
        return torch.stack([*grids, *self._in_order()[1]]).sum(0)

    def finished(self, logit: Float[Tensor, " batch"], split: str, layers: list[int], off: float) -> LogitAttribution:
        """Return the parts in the order of the model."""
        labels, rest = self._in_order()
        grid = torch.stack(self.grids[::-1]) if self.grids else None
        flat = [] if grid is None else [grid.reshape(-1, self.run.batch)]
        return LogitAttribution(
            values=torch.cat((*flat, torch.stack(rest))),
            logit=logit,
            split=split,
            layers=tuple(layers),
            grid_shape=() if grid is None else tuple(grid.shape[:-1]),
            rest_labels=tuple(labels),
            off=off,
        )


# What is asked for


def _split_layers(model: Any, split: str, layers: Sequence[int] | None) -> list[int]:
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
        experts = [layer for layer in chosen if model.cfg.has_experts(layer)]
        if experts:
            raise ValueError(
                f"layers {experts} are mixtures of experts, whose neurons are not recorded: split by component, or "
                "give the layers with plain MLPs as layers="
            )
    return chosen


def _tokens(model: Any, tokens: TokenInput, batch: int) -> Int[Tensor, " batch"]:
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
    return index.to(model.unembed.W_U.device, torch.long).expand(batch)
