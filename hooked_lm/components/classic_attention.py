"""ClassicAttention: names of the classic library's attention that are read, or called by hand, and not by the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_lm.components.by_hand import valid_positions
from hooked_lm.components.positions import RotarySpec, rotary_tables, rotate
from hooked_lm.components.projections import per_query_head
from hooked_lm.components.sequence import SequenceLayout
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.factored_matrix import FactoredMatrix
from hooked_lm.hooks import HookHolder, HookPoint

__all__ = ["ClassicAttention"]

_MASKED = (
    "what a head attends to follows from cfg.attention_dir and attn_type: assign model.cfg.attention_dir, or edit "
)
_ROTATED = "rotary angles follow from the config: HookedTransformer(model.cfg.replace(rotary_base=...)), or override "

# Names that nothing in a forward pass reads: to assign or override one would change nothing. Name -> what does.
WITHOUT_EFFECT = {
    "mask": f"{_MASKED}hook_attn_scores",
    "IGNORE": f"{_MASKED}hook_attn_scores",
    "apply_causal_mask": f"{_MASKED}hook_attn_scores",
    "rotary_sin": f"{_ROTATED}with_positions",
    "rotary_cos": f"{_ROTATED}with_positions",
    "apply_rotary": f"{_ROTATED}with_positions",
    "attn_scale": "the factor on the scores is `scale`, 1 / attn_scale",
    "attn_type": "a local layer has a `window`; Attention(cfg, 'local', layer) makes one",
    "calculate_qkv_matrices": "override queries_keys_values, or project",
    "calculate_attention_scores": "override scores, or edit hook_attn_scores",
    "calculate_z_scores": "override mixed, or edit hook_z",
}
# The classic names of grouped parameters.
_GROUPED = {f"_{name}": name for name in ("W_K", "W_V", "b_K", "b_V")}


class ClassicAttention(HookHolder):
    """Views and steps of attention under their classic names.

    A forward pass reads none of them, so to override or assign one raises, and says what to use instead.
    """

    cfg: HookedTransformerConfig
    n_heads: int
    window: int | None
    scale: float
    rotary: RotarySpec | None
    W_Q: nn.Parameter
    W_K: nn.Parameter
    W_V: nn.Parameter
    W_O: nn.Parameter
    b_K: nn.Parameter
    b_V: nn.Parameter
    hook_q: HookPoint
    hook_k: HookPoint
    hook_v: HookPoint
    hook_z: HookPoint

    if TYPE_CHECKING:  # `Attention` has them

        def project(self, x: Tensor, which: Literal["Q", "K", "V"]) -> Tensor: ...

        def scores(self, q: Tensor, k: Tensor) -> Tensor: ...

        def mixed(self, pattern: Tensor, v: Tensor) -> Tensor: ...

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name in WITHOUT_EFFECT.keys() & vars(cls).keys():
            raise TypeError(f"{cls.__name__} overrides {name}, which no forward pass reads: {WITHOUT_EFFECT[name]}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in WITHOUT_EFFECT:
            self._check_same(name, value)
        else:
            super().__setattr__(_GROUPED.get(name, name), value)  # type: ignore[arg-type]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer; one of the classic library's only with the values that this attention has.

        Args:
            name, tensor, persistent: as torch's.

        Raises:
            AttributeError: the buffer would be without effect.
        """
        if name in WITHOUT_EFFECT:
            self._check_same(name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)

    def _check_same(self, name: str, value: object) -> None:
        """Raise unless what is assigned is what this attention does already."""
        present = getattr(self, name, None)
        if isinstance(value, Tensor) and isinstance(present, Tensor):
            same = value.shape == present.shape and torch.equal(value.to(present), present)
        else:
            same = isinstance(value, (str, float)) and value == present
        if not same:
            raise AttributeError(f"assigning {name} would change nothing: {WITHOUT_EFFECT[name]}")

    # Weights

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T` of every query head, [head d_model d_model]: rows are destinations, columns sources."""
        return FactoredMatrix(self.W_Q, per_query_head(self.W_K, self.n_heads).mT)

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` of every query head, [head d_model d_model]: from the source's residual to the output."""
        return FactoredMatrix(per_query_head(self.W_V, self.n_heads), self.W_O)

    @property
    def _W_K(self) -> nn.Parameter:
        return self.W_K

    @property
    def _W_V(self) -> nn.Parameter:
        return self.W_V

    @property
    def _b_K(self) -> nn.Parameter:
        return self.b_K

    @property
    def _b_V(self) -> nn.Parameter:
        return self.b_V

    # Mask, scale and positions

    @property
    def attn_type(self) -> Literal["global", "local"]:
        """`"local"` with a window, else `"global"`."""
        return "global" if self.window is None else "local"

    @property
    def attn_scale(self) -> float:
        """The number that scores are divided by."""
        return 1.0 / self.scale

    @property
    def mask(self) -> Bool[Tensor, "n_ctx n_ctx"]:
        """Which keys each query sees in causal attention, made when asked for: True on and below the diagonal."""
        n_ctx = self.cfg.n_ctx
        return self._causal(SequenceLayout(n_ctx, 0, self.W_O.device))[0, 0]

    @property
    def IGNORE(self) -> Float[Tensor, ""]:
        """The score of a masked key, minus infinity."""
        return self.W_O.new_tensor(float("-inf"))

    def apply_causal_mask(
        self,
        attn_scores: Float[Tensor, "batch head query key"],
        past_kv_pos_offset: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch head query key"]:
        """Return the scores with minus infinity at masked keys. A query at padding sees itself alone.

        Args:
            attn_scores: scaled scores.
            past_kv_pos_offset: the number of positions in the key-value cache.
            attention_mask: [batch key], 0 at padding.

        Raises:
            ValueError: there are not so many more keys than queries, or the mask has another shape.
        """
        n_queries, n_keys = attn_scores.shape[-2:]
        if n_queries + past_kv_pos_offset != n_keys:
            raise ValueError(
                f"{n_queries} queries after {past_kv_pos_offset} positions have {n_queries + past_kv_pos_offset} keys; "
                f"the scores have {n_keys}"
            )
        layout = self._layout(attn_scores, n_queries, past_kv_pos_offset, attention_mask)
        return attn_scores.masked_fill(~self._causal(layout), float("-inf"))

    def _layout(self, x: Tensor, n_new: int, n_past: int, attention_mask: Tensor | None) -> SequenceLayout:
        valid = valid_positions(attention_mask, x.shape[0], n_past + n_new)
        return SequenceLayout(n_new, n_past, x.device, None if valid is None else valid.to(x.device))

    def _causal(self, layout: SequenceLayout) -> Bool[Tensor, "batch_or_1 1 query key"]:
        allowed = layout.mask(True, self.window)
        if allowed is None:
            return torch.ones(1, 1, layout.n_queries, layout.n_keys, dtype=torch.bool, device=layout.device)
        return allowed

    def apply_rotary(
        self,
        x: Float[Tensor, "batch pos head d_head"],
        past_kv_pos_offset: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return queries or keys, rotated; as they are in a layer that rotates none.

        Args:
            x: queries or keys before rotation.
            past_kv_pos_offset: the position of the first.
            attention_mask: [batch key], 0 at padding, which is not counted as a position.

        Raises:
            ValueError: a mask of another shape.
        """
        if self.rotary is None:
            return x
        layout = self._layout(x, x.shape[1], past_kv_pos_offset, attention_mask)
        return rotate(x, self.rotary, *layout.rotary(self.rotary, x.dtype))

    @property
    def rotary_sin(self) -> Float[Tensor, "n_ctx rotary_dim"]:
        """The sine of every position's angles, made when asked for."""
        return self._rotary_table()[0]

    @property
    def rotary_cos(self) -> Float[Tensor, "n_ctx rotary_dim"]:
        """The cosine of every position's angles, made when asked for."""
        return self._rotary_table()[1]

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        if self.rotary is None:
            raise AttributeError("this layer rotates no queries and keys")
        spec = self.rotary
        return self.calculate_sin_cos_rotary(spec.dim, self.cfg.n_ctx, spec.base, self.W_O.dtype)

    def calculate_sin_cos_rotary(
        self, rotary_dim: int, n_ctx: int, base: float = 10000, dtype: torch.dtype = torch.float32
    ) -> tuple[Float[Tensor, "n_ctx rotary_dim"], Float[Tensor, "n_ctx rotary_dim"]]:
        """Return sine and cosine of the angles of so many positions, scaled as this layer's.

        Args:
            rotary_dim: the number of dimensions that rotate.
            n_ctx: the number of positions.
            base: of the frequencies.
            dtype: of the result; angles are computed in float32.
        """
        spec = RotarySpec(rotary_dim, base) if self.rotary is None else replace(self.rotary, dim=rotary_dim, base=base)
        positions = torch.arange(n_ctx, device=self.W_O.device)[None]
        cos, sin = rotary_tables(spec, positions, torch.full((1,), n_ctx, device=positions.device))
        return sin[0, :, 0].to(dtype), cos[0, :, 0].to(dtype)

    # Steps

    def calculate_qkv_matrices(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch key *kv_head d_model"],
        value_input: Float[Tensor, "batch key *value_head d_model"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values after their hook points and before rotation, [batch pos head d_head]."""
        q, k, v = self.project(query_input, "Q"), self.project(key_input, "K"), self.project(value_input, "V")
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def calculate_attention_scores(
        self, q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the scores, scaled and capped, without mask."""
        return self.scores(q, k)

    def calculate_z_scores(
        self, v: Float[Tensor, "batch key kv_head d_value"], pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "out_batch query head d_value"]:
        """Return z, the values mixed by the pattern, after its hook point."""
        return self.hook_z(self.mixed(pattern, v))
