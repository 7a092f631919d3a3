"""HookedTransformerConfig: a whole architecture as one validated value."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

NORMALIZATION_TYPES = ("LN", "LNPre", "RMS", "RMSPre", None)
POSITION_TYPES = ("standard", "rotary", "alibi", "shortformer", "none")
ATTENTION_DIRECTIONS = ("causal", "bidirectional")
INIT_MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")
ACTIVATIONS = (
    "relu",
    "gelu",
    "silu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu2",
    "identity",
    "solu",
    "solu_ln",
    "xielu",
)
NORM_PLACEMENTS = ("before", "before_and_after", "after", "residual")
QK_NORM_TYPES = ("RMS", "RMSPre", "LN")  # fmt: skip

# Fields of the classic library's configs that this one does not keep: name -> the values that change nothing here.
# Those are dropped, any other value raises. `...` stands for every value.
_RETIRED: dict[str, tuple[Any, ...]] = {
    "load_in_4bit": (False, None),
    "n_devices": (1, None),
    "relative_attention_max_distance": (None,),
    "relative_attention_num_buckets": (None,),
    "decoder_start_token_id": (None,),
    "trust_remote_code": (False, None),
    "layer_norm_folding": (False, None),
}


@dataclass(slots=True, kw_only=True)
class HookedTransformerConfig:
    """The architecture of a `HookedTransformer`.

    A config validates itself, fills in what follows from other fields, and compares equal by value (the device aside).
    `d_head` defaults to `d_model // n_heads`, `d_mlp` to `4 * d_model`, and `d_vocab` to that of the tokenizer.

    Args:
        n_layers: blocks.
        d_model: width of the residual stream.
        n_ctx: longest sequence.
        d_head: width of a head.
        n_heads: attention heads; defaults to `d_model // d_head`.
        n_key_value_heads: heads of keys and values, where several query heads share one (grouped-query attention).
        d_mlp: hidden width of the MLPs.
        d_vocab, d_vocab_out: tokens in, tokens out; -1 for "as the tokenizer" and "as `d_vocab`".
        act_fn: one of `config.ACTIVATIONS`; not needed when `attn_only`.
        attn_only: no MLPs.
        gated_mlp: `act(x W_gate + b_gate) * (x W_in + b_in)`.
        parallel_attn_mlp: the MLP reads the same residual as attention.
        normalization_type: `"LN"`, `"RMS"`, or `"LNPre"`, `"RMSPre"` without gain and bias, or None.
        eps: added to the variance (or mean square) under the root.
        final_rms: the final norm is an RMS norm whatever the others are.
        final_norm: there is a norm before the unembedding.
        norm_placement: where the norms of a block stand. `"before"` attention and MLP read; `"before_and_after"`, also
            on what they write; only `"after"`, on what they write; or on the `"residual"` stream itself, once they
            have written to it (post-norm, Vaswani et al. 2017).
        use_normalization_before_and_after: another name for `norm_placement="before_and_after"`.
        use_qk_norm: a norm on each head's queries and keys.
        qk_norm_type: `"RMS"`, `"RMSPre"` without gain, or `"LN"`.
        qk_norm_across_heads: the norm takes all heads together rather than each by itself.
        qk_norm_per_head_gains: each head has a gain (and bias) of its own rather than one for all.
        qk_norm_after_rotary: the norm comes after the rotation rather than before.
        post_embedding_ln: a norm right after the embedding.
        embedding_scale: token embeddings are multiplied by it.
        logit_scale: logits are multiplied by it, before the soft-cap.
        tie_word_embeddings: `W_U` is the transpose of `W_E`, one tensor. Processing that changes either unties them.
        positional_embedding_type: `"standard"` (learned, added to the stream), `"shortformer"` (learned, added to
            queries and keys only), `"rotary"`, `"alibi"` or `"none"`.
        rotary_dim: how many of a head's dimensions rotate; all by default.
        rotary_base, rotary_base_local: rotary base, and that of local layers where it differs.
        rotary_adjacent_pairs: rotate dimensions (0, 1), (2, 3), ... rather than (0, d/2), (1, d/2 + 1), ...
        rotary_layers: per layer whether it rotates; all by default.
        rotary_scaling_factor: positions are divided by it (linear scaling) in global layers.
        use_NTK_by_parts_rope: Llama-3 scaling of the rotary frequencies.
        NTK_by_parts_factor, NTK_by_parts_low_freq_factor, NTK_by_parts_high_freq_factor, NTK_original_ctx_len: its
            numbers.
        use_yarn_rope: YaRN scaling of the rotary frequencies (Peng et al. 2023).
        yarn_factor, yarn_beta_fast, yarn_beta_slow, yarn_original_max_position_embeddings: its numbers.
        yarn_attention_factor: rotated queries and keys are multiplied by it; `0.1 ln(yarn_factor) + 1` by default.
        yarn_truncate: round the range of pairs that YaRN blends.
        use_dynamic_rope, dynamic_rope_factor, dynamic_rope_original_ctx_len: NTK scaling that grows with the prompt
            once it is longer than the original context.
        use_longrope: a divisor per pair of dimensions, short ones for prompts up to the original context and long ones
            beyond (Ding et al. 2024, "LongRoPE").
        longrope_short_factors, longrope_long_factors, longrope_attention_factor, longrope_original_ctx_len: its
            numbers.
        alibi_scale: ALiBi's slopes are multiplied by it.
        alibi_in_bfloat16: ALiBi's biases are rounded to bfloat16, slope times position of the key.
        attention_dir: `"causal"` or `"bidirectional"`.
        attn_types: per layer `"global"` or `"local"`; a window alone makes every layer local.
        use_local_attn: there are local layers; follows from `window_size`.
        window_size: a local query sees itself and the `window_size - 1` positions before it.
        use_attn_scale, attn_scale: divide scores by `attn_scale`, by default the square root of `d_head`.
        scale_attn_by_inverse_layer_idx: also divide by layer + 1.
        attn_scores_soft_cap, output_logits_soft_cap: `cap * tanh(x / cap)`; off when not positive.
        clip_qkv: queries, keys and values are kept within plus and minus this.
        attention_sinks: each head has a learned score, `attn.sinks`, that takes a share of the softmax and gives
            nothing, so that a pattern's rows sum to less than one.
        num_experts, experts_per_token: mixture of experts, and how many of them a token uses.
        moe_layers: per layer whether it has experts rather than one dense MLP; all by default.
        d_expert: hidden width of an expert; `d_mlp` by default.
        d_shared_expert: hidden width of an expert that every token uses besides; None for none.
        shared_expert_gate: what the shared expert writes is multiplied by a sigmoid of `x W_shared_gate`.
        norm_topk_prob: the chosen experts' weights are rescaled to sum to one.
        sparsemixer_jitter: experts are weighted as SparseMixer does (Liu et al. 2024, "GRIN"), with this tolerance.
        gated_limit: in experts, `act(min(gate, limit)) * (clamp(linear, -limit, limit) + 1)` instead of
            `act(gate) * linear`.
        init_mode, initializer_range, init_weights, seed: how a new model's weights are drawn. An `initializer_range` of
            -1 means `0.8 / sqrt(d_model)` for `"gpt2"` and a gain of 1 for the others.
        n_params: weights of attention and MLPs, counted whatever is given.
        dtype, device: of a new model's parameters.
        default_prepend_bos, default_padding_side, tokenizer_name, tokenizer_prepends_bos: about text.
        model_name, original_architecture, from_checkpoint, checkpoint_index, checkpoint_label_type, checkpoint_value:
            where the weights come from.
        use_attn_result, use_split_qkv_input, use_attn_in, use_hook_mlp_in, use_hook_tokens: accepted, without effect:
            every hook point always exists.
        ungroup_grouped_query_attention: accepted, without effect: keys and values are hooked per key-value head.

    Raises:
        ValueError: a value out of range, or fields that contradict each other.
        TypeError: a field nobody knows.
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int = -1
    n_heads: int = -1
    n_key_value_heads: int | None = None
    d_mlp: int | None = None
    d_vocab: int = -1
    d_vocab_out: int = -1
    act_fn: str | None = None
    attn_only: bool = False
    gated_mlp: bool = False
    parallel_attn_mlp: bool = False
    normalization_type: str | None = "LN"
    eps: float = 1e-5
    final_rms: bool = False
    final_norm: bool = True
    norm_placement: str = "before"
    use_normalization_before_and_after: bool = False
    use_qk_norm: bool = False
    qk_norm_type: str = "RMS"
    qk_norm_across_heads: bool = False
    qk_norm_per_head_gains: bool = False
    qk_norm_after_rotary: bool = False
    post_embedding_ln: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    tie_word_embeddings: bool = False
    positional_embedding_type: str = "standard"
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_base_local: float | None = None
    rotary_adjacent_pairs: bool = False
    rotary_layers: list[bool] | None = None
    rotary_scaling_factor: float = 1.0
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_factor: float = 8.0
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float | None = None
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    use_dynamic_rope: bool = False
    dynamic_rope_factor: float = 1.0
    dynamic_rope_original_ctx_len: int = 4096
    use_longrope: bool = False
    longrope_short_factors: list[float] | None = None
    longrope_long_factors: list[float] | None = None
    longrope_attention_factor: float = 1.0
    longrope_original_ctx_len: int = 4096
    alibi_scale: float = 1.0
    alibi_in_bfloat16: bool = False
    attention_dir: str = "causal"
    attn_types: list[str] | None = None
    use_local_attn: bool | None = None
    window_size: int | None = None
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    scale_attn_by_inverse_layer_idx: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    clip_qkv: float | None = None
    attention_sinks: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    moe_layers: list[bool] | None = None
    d_expert: int | None = None
    d_shared_expert: int | None = None
    shared_expert_gate: bool = False
    norm_topk_prob: bool = True
    sparsemixer_jitter: float | None = None
    gated_limit: float | None = None
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    init_weights: bool = True
    seed: int | None = None
    dtype: torch.dtype = torch.float32
    device: str | None = field(default=None, compare=False)
    default_prepend_bos: bool = True
    default_padding_side: str = "right"
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    model_name: str = "custom"
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    n_params: int | None = None
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False
    ungroup_grouped_query_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_ctx"):
            self._require_positive(name, at_least=0 if name == "n_layers" else 1)
        self._fill_heads()
        self._fill_mlp()
        self._fill_experts()
        self._fill_norms()
        self._fill_vocab()
        self._fill_positions()
        self._fill_windows()
        self._fill_init()
        self._check_choices()
        self.n_params = self._count_parameters()

    # Filling in and checking, one concern each

    def _fill_heads(self) -> None:
        if self.n_heads == -1 and self.d_head == -1:
            raise ValueError("give n_heads or d_head: one follows from d_model and the other")
        if self.n_heads == -1:
            self._require_positive("d_head")
            self._require_divisible("d_model", "d_head", "give n_heads")
            self.n_heads = self.d_model // self.d_head
        self._require_positive("n_heads")
        if self.d_head == -1:
            self._require_divisible("d_model", "n_heads", "give d_head")
            self.d_head = self.d_model // self.n_heads
        self._require_positive("d_head")
        if self.n_key_value_heads is not None:
            self._require_positive("n_key_value_heads")
            self._require_divisible("n_heads", "n_key_value_heads", "each key-value head serves as many query heads")
        if not self.use_attn_scale:
            self.attn_scale = 1.0
        elif self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        self._require_above_zero("clip_qkv", or_none=True)
        if not self.attn_scale > 0:
            raise ValueError(f"attn_scale is what scores are divided by, so it is positive; got {self.attn_scale}")

    def _fill_mlp(self) -> None:
        if self.attn_only:
            if self.num_experts is not None or self.gated_mlp:
                raise ValueError("attn_only leaves no MLP: num_experts and gated_mlp do not go with it")
            return
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        self._require_positive("d_mlp")
        if self.act_fn is None:
            raise ValueError(f"act_fn is missing: give one of {ACTIVATIONS}, or attn_only=True for no MLPs")
        if self.gated_mlp and self.act_fn == "solu_ln":
            raise ValueError("solu_ln is not defined for a gated MLP")

    def _fill_experts(self) -> None:
        if (self.num_experts is None) != (self.experts_per_token is None):
            raise ValueError("num_experts and experts_per_token go together")
        if self.num_experts is None or self.experts_per_token is None:
            about_experts = ("moe_layers", "d_expert", "d_shared_expert", "sparsemixer_jitter", "gated_limit")
            for name in (*about_experts, "shared_expert_gate"):
                if getattr(self, name) is not None and getattr(self, name) is not False:
                    raise ValueError(f"{name} goes with num_experts: this config has no experts")
            return
        self._require_positive("num_experts")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} is not in 1-{self.num_experts}")
        if self.act_fn in ("solu_ln", "xielu"):
            raise ValueError(f"{self.act_fn} is not defined for a mixture of experts")
        self._require_above_zero("gated_limit", "sparsemixer_jitter", or_none=True)
        if self.sparsemixer_jitter is not None and self.experts_per_token != 2:
            raise ValueError(f"SparseMixer picks two experts, not experts_per_token={self.experts_per_token}")
        if self.gated_limit is not None and not self.gated_mlp:
            raise ValueError("gated_limit is about the two factors of gated experts: give gated_mlp=True")
        if self.d_shared_expert is not None and not self.gated_mlp:
            raise ValueError("the shared expert is a gated MLP: d_shared_expert needs gated_mlp=True")
        if self.shared_expert_gate and self.d_shared_expert is None:
            raise ValueError("shared_expert_gate needs a shared expert: give d_shared_expert")
        for name in ("d_expert", "d_shared_expert"):
            if getattr(self, name) is not None:
                self._require_positive(name)
        self._check_per_layer("moe_layers")

    def _fill_norms(self) -> None:
        if self.use_normalization_before_and_after:
            if self.norm_placement not in ("before", "before_and_after"):
                raise ValueError(
                    f"use_normalization_before_and_after contradicts norm_placement={self.norm_placement!r}"
                )
            self.norm_placement = "before_and_after"
        self.use_normalization_before_and_after = self.norm_placement == "before_and_after"
        if self.final_rms and not self.final_norm:
            raise ValueError("final_rms says what the final norm is, and final_norm=False that there is none")
        for name in ("qk_norm_across_heads", "qk_norm_per_head_gains", "qk_norm_after_rotary"):
            if getattr(self, name) and not self.use_qk_norm:
                raise ValueError(f"{name} says how queries and keys are normalised: it needs use_qk_norm=True")
        if self.norm_placement == "residual" and self.parallel_attn_mlp:
            raise ValueError("norms on the residual stream come after attention and after the MLP: not in parallel")

    def _fill_vocab(self) -> None:
        for name in ("d_vocab", "d_vocab_out"):
            if getattr(self, name) != -1:
                self._require_positive(name)
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        # A vocabulary that the tokenizer decides is compared once it is known.
        if self.tie_word_embeddings and self.d_vocab != -1 and self.d_vocab_out != self.d_vocab:
            raise ValueError(f"tied embeddings have one vocabulary, not {self.d_vocab} in and {self.d_vocab_out} out")

    def _fill_positions(self) -> None:
        if self.positional_embedding_type == "rotary":
            if self.rotary_dim is None:
                self.rotary_dim = self.d_head
            self._require_positive("rotary_dim")
            if self.rotary_dim % 2 or self.rotary_dim > self.d_head:
                raise ValueError(f"rotary_dim {self.rotary_dim} is not even and at most d_head {self.d_head}")
            self._check_rotary_scaling(self.rotary_dim // 2)
        elif self.rotary_layers is not None:
            raise ValueError(f"rotary_layers goes with rotary positions, not {self.positional_embedding_type!r}")
        self._require_above_zero("rotary_base", "alibi_scale", "embedding_scale", "logit_scale")
        self._require_above_zero("rotary_base_local", or_none=True)
        if self.alibi_in_bfloat16 and self.attention_dir == "bidirectional":
            raise ValueError("alibi_in_bfloat16 counts from the first key, which only causal attention allows")
        self._check_per_layer("rotary_layers")

    def _check_rotary_scaling(self, n_pairs: int) -> None:
        switches = ("use_NTK_by_parts_rope", "use_yarn_rope", "use_dynamic_rope", "use_longrope")
        scalings = [name for name in switches if getattr(self, name)]
        if self.rotary_scaling_factor != 1.0:
            scalings.append("rotary_scaling_factor")
        if len(scalings) > 1:
            raise ValueError(f"rotary frequencies are scaled in one way, not by {' and '.join(scalings)}")
        if self.rotary_scaling_factor == 0:  # a negative one turns the other way
            raise ValueError("rotary_scaling_factor is what positions are divided by, so it is not 0")
        if self.use_NTK_by_parts_rope:
            self._require_above_zero("NTK_by_parts_factor", "NTK_original_ctx_len")
            low, high = self.NTK_by_parts_low_freq_factor, self.NTK_by_parts_high_freq_factor
            if not 0 < low < high:
                raise ValueError(f"NTK_by_parts_low_freq_factor {low} is not above 0 and below the high one, {high}")
        if self.use_yarn_rope:
            self._require_above_zero("yarn_factor", "yarn_beta_fast", "yarn_beta_slow")
            self._require_above_zero("yarn_original_max_position_embeddings")
            self._require_above_zero("yarn_attention_factor", or_none=True)
        if self.use_dynamic_rope:
            self._require_above_zero("dynamic_rope_factor", "dynamic_rope_original_ctx_len")
            if n_pairs == 1:
                raise ValueError("use_dynamic_rope stretches every pair but the fastest: rotary_dim 2 has no other")
        if self.use_longrope:
            self._require_above_zero("longrope_attention_factor", "longrope_original_ctx_len")
            for name in ("longrope_short_factors", "longrope_long_factors"):
                factors = getattr(self, name)
                if factors is None or len(factors) != n_pairs or not all(_is_above_zero(f) for f in factors):
                    raise ValueError(f"{name} holds one positive factor for each of {n_pairs} pairs; got {factors}")

    def _check_per_layer(self, name: str) -> None:
        per_layer = getattr(self, name)
        if per_layer is None:
            return
        listed = isinstance(per_layer, (list, tuple)) and all(isinstance(value, bool) for value in per_layer)
        if not listed or len(per_layer) < self.n_layers:
            raise ValueError(f"{name} holds True or False for each of {self.n_layers} layers; got {per_layer}")
        setattr(self, name, list(per_layer))

    def _fill_windows(self) -> None:
        if self.use_local_attn is None:
            self.use_local_attn = self.window_size is not None
        if not self.use_local_attn:
            if self.attn_types is not None and "local" in self.attn_types and self.window_size is None:
                raise ValueError("attn_types names local layers: give window_size")
            return
        if self.window_size is None:
            raise ValueError("use_local_attn needs window_size")
        self._require_positive("window_size")
        if self.attn_types is None:
            self.attn_types = ["local"] * self.n_layers
        if len(self.attn_types) < self.n_layers or not set(self.attn_types) <= {"global", "local"}:
            raise ValueError(
                f"attn_types holds 'global' or 'local' for each of {self.n_layers} layers; got {self.attn_types}"
            )

    def _fill_init(self) -> None:
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if self.init_mode == "gpt2" else 1.0
        self.dtype = _parse_dtype(self.dtype)
        if self.device is not None:
            self.device = str(torch.device(self.device))

    def _check_choices(self) -> None:
        for name, choices in (
            ("normalization_type", NORMALIZATION_TYPES),
            ("positional_embedding_type", POSITION_TYPES),
            ("attention_dir", ATTENTION_DIRECTIONS),
            ("init_mode", INIT_MODES),
            ("act_fn", (*ACTIVATIONS, None)),
            ("norm_placement", NORM_PLACEMENTS),
            ("qk_norm_type", QK_NORM_TYPES),
            ("default_padding_side", ("left", "right")),
        ):
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name}={value!r} is none of {choices}{hint}")
        if self.final_rms and self.normalization_type is None:
            raise ValueError("final_rms goes with norms: with normalization_type=None there is no final norm")
        if not self.eps >= 0:
            raise ValueError(f"eps is not negative; got {self.eps}")

    def _require_positive(self, name: str, at_least: int = 1) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"{name} is an integer of at least {at_least}; got {value!r}")

    def _require_above_zero(self, *names: str, or_none: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not (_is_above_zero(value) or (or_none and value is None)):
                raise ValueError(f"{name} is positive; got {value!r}")

    def _require_divisible(self, name: str, by: str, otherwise: str) -> None:
        if getattr(self, name) % getattr(self, by):
            raise ValueError(f"{name} {getattr(self, name)} is not a multiple of {by} {getattr(self, by)}: {otherwise}")

    def _count_parameters(self) -> int:
        """Weights of attention and MLPs: no embeddings, biases or norms (Kaplan et al. 2020, "Scaling Laws")."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        count = self.n_layers * self.d_model * self.d_head * heads
        if self.d_mlp is not None and not self.attn_only:
            per_width = (3 if self.gated_mlp else 2) * self.d_model
            for layer in range(self.n_layers):
                count += self._mlp_parameters(layer, per_width)
        return count

    def _mlp_parameters(self, layer: int, per_width: int) -> int:
        if not self.has_experts(layer):
            return per_width * (self.d_mlp or 0)
        shared = per_width * (self.d_shared_expert or 0) + (self.d_model if self.shared_expert_gate else 0)
        return shared + (per_width * self.expert_width + self.d_model) * (self.num_experts or 0)

    # What follows from the fields

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads: `n_key_value_heads`, or `n_heads` where queries are not grouped."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts is not None and (self.moe_layers is None or self.moe_layers[layer])

    @property
    def expert_width(self) -> int:
        """The hidden width of an expert: `d_expert`, or `d_mlp` where that is not given.

        Raises:
            ValueError: a model of attention only has none.
        """
        width = self.d_mlp if self.d_expert is None else self.d_expert
        if width is None:
            raise ValueError("this config is attn_only: it has no MLP")
        return width

    @property
    def normalizes_writes(self) -> bool:
        """Whether a norm comes between what attention and MLP write and where the stream goes on."""
        return self.norm_placement != "before"

    def rotates(self, layer: int) -> bool:
        """Whether a layer rotates its queries and keys."""
        rotary = self.positional_embedding_type == "rotary"
        return rotary and (self.rotary_layers is None or self.rotary_layers[layer])

    def rotation_changes(self, before: int, after: int) -> bool:
        """Whether positions that a prompt of length `before` has turn differently once it has length `after`.

        Args:
            before, after: lengths in tokens, padding not counted.
        """
        if self.positional_embedding_type != "rotary" or before >= after:
            return False
        if self.use_dynamic_rope:
            return after > self.dynamic_rope_original_ctx_len
        return self.use_longrope and before <= self.longrope_original_ctx_len < after

    def window(self, layer: int) -> int | None:
        """The window of a local layer; None in a global one."""
        if not self.use_local_attn or self.attn_types is None or self.attn_types[layer] == "global":
            return None
        return self.window_size

    def score_scale(self, layer: int) -> float:
        """What attention scores of a layer are multiplied by."""
        scale = 1.0 / self.attn_scale if self.use_attn_scale else 1.0
        return scale / ((layer + 1) if self.scale_attn_by_inverse_layer_idx else 1)

    def is_layer_norm_activation(self) -> bool:
        """Whether the MLP has a layer norm after its activation function (`solu_ln`)."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    # In and out

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain data that JSON can hold; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> HookedTransformerConfig:
        """Build a config from a dictionary, also one saved by the classic library.

        Raises:
            ValueError: a required field is missing, or a retired field asks for something that is not supported.
            TypeError: a field nobody knows.
        """
        if not isinstance(config_dict, dict):
            raise TypeError(f"a config is built from a dictionary, got {type(config_dict).__name__}")
        fields = dict(config_dict)
        missing = [name for name in ("n_layers", "d_model", "n_ctx") if name not in fields]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}; it has {sorted(fields)}")
        return cls(**fields)

    @classmethod
    def unwrap(cls, config: HookedTransformerConfig | dict[str, Any]) -> HookedTransformerConfig:
        """Return a config from a config or a dictionary."""
        return cls.from_dict(config) if isinstance(config, dict) else config

    def replace(self, **changes: Any) -> HookedTransformerConfig:
        """Return a copy with some fields changed, validated anew; defaults that follow from them follow."""
        refilled = self._defaults_to_refill()
        # Two names of one thing: the one that is given decides.
        if "norm_placement" in changes:
            refilled["use_normalization_before_and_after"] = False
        elif "use_normalization_before_and_after" in changes and self.norm_placement == "before_and_after":
            refilled["norm_placement"] = "before"
        return dataclasses.replace(self, **{**refilled, **changes})

    def _defaults_to_refill(self) -> dict[str, Any]:
        """The fields that hold what follows from others, each with the value that has it filled in."""
        gpt2_range = 0.8 / math.sqrt(self.d_model)
        follows: dict[str, tuple[bool, Any]] = {
            "d_mlp": (self.d_mlp == 4 * self.d_model and not self.attn_only, None),
            "d_vocab_out": (self.d_vocab_out == self.d_vocab, -1),
            "attn_scale": (self.attn_scale == math.sqrt(self.d_head), -1.0),
            "rotary_dim": (self.rotary_dim == self.d_head, None),
            "initializer_range": (self.init_mode == "gpt2" and self.initializer_range == gpt2_range, -1.0),
        }
        return {name: refill for name, (is_default, refill) in follows.items() if is_default}


def _is_above_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _checked_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields a config keeps, of those given: retired ones are dropped, unknown ones raise."""
    known = [known_field.name for known_field in dataclasses.fields(HookedTransformerConfig)]
    kept = {}
    for name, value in fields.items():
        if name in known:
            kept[name] = value
        elif name not in _RETIRED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"a config has no field {name!r}{hint}")
        elif ... not in _RETIRED[name] and value not in _RETIRED[name]:
            raise ValueError(f"{name}={value!r} is not supported; only {_RETIRED[name][0]!r} is")
    return kept


def _check_before(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked_init(self: HookedTransformerConfig, **fields: Any) -> None:
        init(self, **_checked_fields(fields))

    return checked_init


HookedTransformerConfig.__init__ = _check_before(HookedTransformerConfig.__init__)  # type: ignore[method-assign]


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is a floating-point torch dtype or its name; got {dtype!r}")
    return dtype
