"""Normalisation: LayerNorm and RMSNorm, with gain and bias or, once those are folded away, without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm._support.torch_internals import has_any_module_hooks
from hooked_lm.components.activations import Activation, identity
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookHolder, HookPoint, is_live

__all__ = [
    "NORMS",
    "LayerNorm",
    "LayerNormPre",
    "NoNorm",
    "Norm",
    "RMSNorm",
    "RMSNormPre",
    "make_block_norm",
    "make_norm",
    "make_qk_norm",
    "make_writing_norm",
]


class Norm(HookHolder):
    """`(x - mean) / scale * w + b`, where `scale = sqrt(variance + eps)`; RMS norms subtract no mean.

    One fused operation unless `hook_scale` or `hook_normalized` is live.

    Args:
        length: the size of the normalised axis, the last, or of the last few, which are then normalised together.
        eps: added under the root.
        centred: subtract the mean (LayerNorm) or not (RMSNorm).
        affine: has a gain `w`, and a bias `b` if centred; otherwise neither.
        axes: the axes of the input, for the hook points.
        gains: the shape of `w` and `b`, by default that of the normalised axes. With a head axis, an input that has
            several copies of each head, side by side, gets the head's gain at each of them.
    """

    def __init__(
        self,
        length: int | tuple[int, ...],
        eps: float,
        centred: bool,
        affine: bool,
        axes: str = "batch pos d_model",
        gains: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.shape = (length,) if isinstance(length, int) else length
        self.eps, self.centred = eps, centred
        gains = self.shape if gains is None else gains
        # How many heads the gains, or the axes normalised together, are for; None for norms that know of no heads.
        self.n_heads = gains[0] if len(gains) == 2 else None
        self.w = nn.Parameter(torch.ones(gains)) if affine else None
        self.b = nn.Parameter(torch.zeros(gains)) if affine and centred else None
        outer = axes.split()[: -len(self.shape)]
        self.hook_scale = HookPoint(" ".join((*outer, *("1" for _ in self.shape))))
        self.hook_normalized = HookPoint(axes)

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*out_batch length"]:
        if is_live(self.hook_scale) or is_live(self.hook_normalized):
            return self.step_by_step(x, self.hook_scale, self.hook_normalized)
        return self.without_hooks(x)

    def step_by_step(
        self, x: Float[Tensor, "*batch length"], see_scale: Activation = identity, see_normalized: Activation = identity
    ) -> Float[Tensor, "*out_batch length"]:
        """Normalise by way of scale and normalised input, each passed through a function on its way."""
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        over = tuple(range(-len(self.shape), 0))
        if self.centred:
            exact = exact - exact.mean(over, keepdim=True)
        scale = see_scale((exact.square().mean(over, keepdim=True) + self.eps).sqrt())
        return self._with_gain(see_normalized((exact / scale).to(x.dtype)))

    def without_hooks(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*out_batch length"]:
        """Normalise without showing anything to the hook points."""
        (w, b), shape = self._gain_and_bias(x), self.shape if self.n_heads is None else x.shape[-len(self.shape) :]
        if w is not None and w.shape != shape:
            return self._with_gain(self._normalized(x, shape, None, None))
        return self._normalized(x, shape, w, b)

    def _normalized(self, x: Tensor, shape: Sequence[int], w: Tensor | None, b: Tensor | None) -> Tensor:
        if self.centred:
            return F.layer_norm(x, shape, w, b, self.eps)
        return F.rms_norm(x, shape, w, self.eps)

    def _gain_and_bias(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.n_heads is None or self.w is None or x.shape[-2] == self.n_heads:
            return self.w, self.b
        group = x.shape[-2] // self.n_heads
        return self.w.repeat_interleave(group, 0), None if self.b is None else self.b.repeat_interleave(group, 0)

    def _with_gain(self, normalized: Tensor) -> Tensor:
        w, b = self._gain_and_bias(normalized)
        if w is None:
            return normalized
        return normalized * w if b is None else torch.addcmul(b, normalized, w)

    def drop_gain_and_bias(self) -> None:
        """Become the norm without gain and bias, once they have been folded into the weights that read from it."""
        self.w = self.b = None

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}, centred={self.centred}, affine={self.w is not None}"


class LayerNorm(Norm):
    """LayerNorm with gain and bias (Ba et al. 2016)."""

    def __init__(
        self, cfg: HookedTransformerConfig | ConfigDict, length: int | None = None, axes: str = "batch pos d_model"
    ) -> None:
        cfg = HookedTransformerConfig.unwrap(cfg)
        super().__init__(length or cfg.d_model, cfg.eps, centred=True, affine=True, axes=axes)
        self.cfg = cfg


class LayerNormPre(Norm):
    """LayerNorm whose gain and bias have been folded into the weights that read from it."""

    def __init__(
        self, cfg: HookedTransformerConfig | ConfigDict, length: int | None = None, axes: str = "batch pos d_model"
    ) -> None:
        cfg = HookedTransformerConfig.unwrap(cfg)
        super().__init__(length or cfg.d_model, cfg.eps, centred=True, affine=False, axes=axes)
        self.cfg = cfg


class RMSNorm(Norm):
    """RMSNorm with a gain (Zhang and Sennrich 2019)."""

    def __init__(
        self, cfg: HookedTransformerConfig | ConfigDict, length: int | None = None, axes: str = "batch pos d_model"
    ) -> None:
        cfg = HookedTransformerConfig.unwrap(cfg)
        super().__init__(length or cfg.d_model, cfg.eps, centred=False, affine=True, axes=axes)
        self.cfg = cfg


class RMSNormPre(Norm):
    """RMSNorm whose gain has been folded into the weights that read from it."""

    def __init__(
        self, cfg: HookedTransformerConfig | ConfigDict, length: int | None = None, axes: str = "batch pos d_model"
    ) -> None:
        cfg = HookedTransformerConfig.unwrap(cfg)
        super().__init__(length or cfg.d_model, cfg.eps, centred=False, affine=False, axes=axes)
        self.cfg = cfg


NORMS: dict[str, type[LayerNorm | LayerNormPre | RMSNorm | RMSNormPre]] = {
    "LN": LayerNorm,
    "LNPre": LayerNormPre,
    "RMS": RMSNorm,
    "RMSPre": RMSNormPre,
}


class NoNorm(nn.Identity):
    """The identity, where a config has no norm."""

    def __call__(self, x: Tensor) -> Tensor:
        # Skip torch's module call, unless the module has hooks of torch's.
        return super().__call__(x) if has_any_module_hooks(self) else x


def is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of this package, of no other class and without changes of its own.

    Args:
        module: what stands in a norm's place.
    """
    kinds = (Norm, NoNorm, *NORMS.values())
    return type(module) in kinds and "forward" not in vars(module) and not has_any_module_hooks(module)


def make_norm(
    cfg: HookedTransformerConfig, length: int | None = None, axes: str = "batch pos d_model", kind: str | None = None
) -> nn.Module:
    """Return a config's norm (or one of another `kind`); the identity if the config has none."""
    kind = kind or cfg.normalization_type
    return NoNorm() if kind is None else NORMS[kind](cfg, length, axes)


def make_writing_norm(cfg: HookedTransformerConfig) -> nn.Module:
    """Return a norm whose output is added to the residual stream, so that its gain and bias cannot be folded."""
    return make_norm(cfg, kind=cfg.normalization_type and cfg.normalization_type.removesuffix("Pre"))


def make_block_norm(cfg: HookedTransformerConfig, *, writing: bool = False, folds: bool = True) -> nn.Module:
    """Return a block's norm before (or, if `writing`, after) attention or MLP; the identity if it has none there.

    With `norm_placement="residual"` the norm before is on the stream itself, and keeps its gain and bias; so does one
    that does not fold, since something writes its output to the stream.
    """
    placement = cfg.norm_placement
    if writing:
        return make_writing_norm(cfg) if placement in ("before_and_after", "after") else NoNorm()
    if placement == "residual":
        return make_writing_norm(cfg)
    if placement == "after":
        return NoNorm()
    return make_norm(cfg) if folds else make_writing_norm(cfg)


def make_qk_norm(cfg: HookedTransformerConfig, heads: int, axes: str) -> nn.Module:
    """Return the norm of the queries or keys of so many heads; the identity if the config has none."""
    if not cfg.use_qk_norm:
        return NoNorm()
    every_head = (heads, cfg.d_head)
    return Norm(
        every_head if cfg.qk_norm_across_heads else cfg.d_head,
        cfg.eps,
        centred=cfg.qk_norm_type == "LN",
        affine=cfg.qk_norm_type != "RMSPre",
        axes=axes,
        gains=every_head if cfg.qk_norm_across_heads or cfg.qk_norm_per_head_gains else None,
    )
