"""The parts of a logit, found from the end of the model to its start, and the check that they sum to the logit."""

from __future__ import annotations

from typing import cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm.activation_cache import ActivationCache
from hooked_lm.circuits.attribution_result import LogitAttribution
from hooked_lm.components import TransformerBlock
from hooked_lm.components.activations import soft_cap
from hooked_lm.components.norm import Norm
from hooked_lm.components.stock import not_stock
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import get_act_name

__all__ = ["LogitParts", "RecordedRun"]

# A sum counts as exact if its error is below this number of rounding errors of the largest possible terms.
_ROUNDINGS = 64


class RecordedRun:
    """A cached run at one position of each prompt: activations [batch ...], half precision as float32.

    Args:
        cache: of the run.
        pos: the position, or one for each prompt.
        precision: the relative precision of the run's numbers; None for that of their dtype.
    """

    def __init__(self, cache: ActivationCache, pos: int | Int[Tensor, " batch"], precision: float | None) -> None:
        if precision is not None and not 0 < precision < 1:
            raise ValueError(f"precision is relative, between 0 and 1, got {precision}")
        self.cache, self.model = cache, cast("HookedModel", cache.model)
        W_U = self.model.W_U
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
        index = (index % self.n_pos).expand(self.batch)
        mask = self.cache.attention_mask
        if mask is not None and tuple(mask.shape) == (self.batch, self.n_pos):
            mask = mask.to(self.device)
            padded = torch.where(mask.gather(1, index[:, None])[:, 0] == 0)[0].tolist()
            if padded:
                ends = self.n_pos - 1 - mask.flip(1).argmax(1)
                raise ValueError(
                    f"pos {pos!r} is padding in prompt {padded[0]} of this run: pad on the left (padding_side='left'), "
                    f"or give a position for each prompt; their last tokens are at pos=torch.tensor({ends.tolist()})"
                )
        return index

    def exact(self, x: Tensor) -> Tensor:
        """Return half precision as float32, and anything else as it is; on the device of the logits."""
        x = x.to(self.device)
        return x.float() if self.half else x

    def whole(self, name: str) -> Tensor:
        """Return an activation with its batch axis."""
        x = self.cache[name]
        return x if self.cache.has_batch_dim else x[None]

    def at(self, name: str, axis: int = 1) -> Tensor:
        """Return an activation at the position, [batch ...]; `axis` is that of the positions."""
        x = self.whole(name).movedim(axis, 1)
        if x.shape[1] != self.n_pos:
            raise ValueError(
                f"{name!r} has {x.shape[1]} positions in this cache and the logits {self.n_pos}: record the run "
                "without logits_to_keep"
            )
        return self.exact(x[self.prompts.to(x.device), self.pos.to(x.device)].to(self.device))

    def logit(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the model's own logit; before the soft-cap, where there is one."""
        logit = self.at("unembed.hook_out")[self.prompts, tokens]
        cfg, unembed = self.model.cfg, self.model.unembed
        cap = cfg.output_logits_soft_cap
        if cap <= 0:
            return logit
        # A capped logit that has rounded to the cap cannot be inverted, so the logit before the cap is computed again.
        direction, bias = self.exact(self.model.W_U[:, tokens].mT), self.exact(unembed.b_U[tokens])
        stream = self.at("unembed.hook_in")
        uncapped = ((stream * direction).sum(-1) + bias) * cfg.logit_scale
        size = (stream * direction).abs().sum(-1) * cfg.logit_scale + cap
        self.require_equal("the logit computed again from unembed.hook_in is", soft_cap(uncapped, cap), logit, size)
        return uncapped

    def require_equal(self, what: str, came: Tensor, expected: Tensor, size: Tensor) -> float:
        """Return the largest difference between `came` [batch] and `expected`.

        Args:
            what: describes `came` in an error.
            came, expected: the numbers, [batch].
            size: how large the terms of the sum could be, [batch]: rounding errors are relative to it.

        Raises:
            ValueError: they differ by more than rounding.
        """
        off, allowed = (came - expected).abs(), _ROUNDINGS * self.eps * size
        if not bool((off <= allowed).all()):
            worst = int((off - allowed).nan_to_num(float("inf")).argmax())
            raise ValueError(
                f"{what} {float(came[worst]):.6g} where the model has {float(expected[worst]):.6g} (prompt "
                f"{worst}): off by {float(off[worst]):.3g}, and float error explains {float(allowed[worst]):.1g}. A "
                f"hook or intervention changed the run in between, {self._override()}the weights are not those of the "
                "run, or it ran in less precision than the weights have (then say precision=)"
            )
        return float(off.max())

    def _override(self) -> str:
        """The first overridden component, as a cause for an error; empty if all components are stock."""
        model = cast("nn.Module", self.model)
        reason = not_stock(model)
        return "" if reason is None else f"a component computes something else ({reason}), "


class LogitParts:
    """The parts of a logit, collected from the end of the model to its start.

    Attributes:
        size: the sum of the parts' largest possible absolute values, [batch]: rounding errors are relative to it.
    """

    def __init__(self, run: RecordedRun) -> None:
        self.run, self.model = run, run.model
        self.grids: list[Tensor] = []  # per split layer, the last first, [*part batch]
        self.rest: list[tuple[str, Tensor]] = []  # the last first
        self.biases: list[tuple[str, Tensor]] = []
        self.size = torch.zeros(run.batch, device=run.device)

    def unembed(
        self, right: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch d_model"]:
        """Add the biases at the end as parts; return the direction in which the logit reads the stream there."""
        W_U, b_U, exact = self.model.W_U, self.model.unembed.b_U, self.run.exact
        direction, bias = exact(W_U[:, right].mT), exact(b_U[right])
        if wrong is not None:
            direction, bias = direction - exact(W_U[:, wrong].mT), bias - exact(b_U[wrong])
        self._add_bias("unembed.b_U", bias * self.model.cfg.logit_scale)
        return self._before(self.model.ln_final, "ln_final", direction * self.model.cfg.logit_scale)

    def add_layer(
        self, layer: int, block: TransformerBlock, direction: Float[Tensor, "batch d_model"], split: str
    ) -> Float[Tensor, "batch d_model"]:
        """Add what a layer writes as parts; return the direction in which the stream before the layer is read."""
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
        """Add the embeddings, with which the stream starts, as parts."""
        # Shortformer's positions never enter the stream.
        if self.model.cfg.positional_embedding_type == "standard":
            self._add_read("pos_embed", self.run.at("hook_pos_embed"), direction)
        self._add_read("embed", self.run.at("hook_embed"), direction)

    # Single parts

    def _add_write(self, site: str, layer: int, direction: Float[Tensor, "batch d_model"], split: bool) -> None:
        """Add the whole output of attention or MLP as a part; if it is to be split, only count its size."""
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
        """Return the direction before a norm that `direction` after the norm reads; the norm's bias becomes a part."""
        if not isinstance(norm, Norm):
            return direction
        if norm.b is not None:
            self._add_bias(f"{label}.b", direction @ self.run.exact(norm.b))
        before = direction if norm.w is None else direction * self.run.exact(norm.w)
        before = before / self.run.at(norm.hook_scale.name)
        # (x - mean) . r  =  x . (r - mean)
        return before - before.mean(-1, keepdim=True) if norm.centred else before

    # One layer, taken apart

    def _add_heads(
        self, layer: int, block: TransformerBlock, direction: Float[Tensor, "batch d_model"], by_source: bool
    ) -> None:
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
        onto = onto * run.at(get_act_name("gate", layer)) if self.model.cfg.attention_gate else onto
        grouped = rearrange(onto, "batch (kv_head group) d_head -> batch kv_head group d_head", kv_head=v.shape[2])
        read = einsum(v, grouped, "batch key kv_head d_head, batch kv_head group d_head -> batch kv_head group key")
        read = rearrange(read, "batch kv_head group key -> batch (kv_head group) key")
        return einsum(pattern, read, "batch head key, batch head key -> head key batch")

    def _add_neurons(self, layer: int, block: TransformerBlock, direction: Float[Tensor, "batch d_model"]) -> None:
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
        """Add a layer's parts; together with the biases after the first `n_biases` they are what the layer writes."""
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
        """The parts outside the grid: what is written, from first to last, then the biases."""
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
