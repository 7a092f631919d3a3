"""HookedTransformerConfig: a whole architecture as one validated value."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hooked_lm.config.checks import fill_and_check
from hooked_lm.config.classic import ConfigDict, FieldValue, checked_fields, completed
from hooked_lm.config.lock import Lockable, plain

__all__ = ["HookedTransformerConfig"]


@dataclass(slots=True, kw_only=True)
class HookedTransformerConfig(Lockable):
    """The architecture of a `HookedTransformer`.

    A config checks its fields, fills in those that follow from others, and compares equal by value (the device aside).
    The config of a built model is locked: see `lock`.
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
        act_fn: one of `config.activation_names()`; not needed when `attn_only`.
        attn_only: no MLPs.
        gated_mlp: `act(x W_gate + b_gate) * (x W_in + b_in)`.
        parallel_attn_mlp: the MLP reads the same residual as attention.
        normalization_type: `"LN"`, `"RMS"`, or `"LNPre"`, `"RMSPre"` without gain and bias, or None.
        eps: added to the variance (or mean square) under the root.
        final_rms: the final norm is an RMS norm whatever the others are.
        final_norm: there is a norm before the unembedding.
        first_norm: there is a norm before attention in the first block too.
        norm_placement: where the norms of a block stand. `"before"` attention and MLP, on their input;
            `"before_and_after"`, also on their output; `"after"`, only on their output; or on the `"residual"` stream
            itself, after each addition to it (post-norm, Vaswani et al. 2017).
        use_normalization_before_and_after: another name for `norm_placement="before_and_after"`.
        use_qk_norm: a norm on each head's queries and keys.
        qk_norm_type: `"RMS"`, `"RMSPre"` without gain, or `"LN"`.
        qk_norm_across_heads: the norm takes all heads together rather than each by itself.
        qk_norm_per_head_gains: each head has a gain (and bias) of its own rather than one for all.
        qk_norm_after_rotary: the norm comes after the rotation rather than before.
        post_embedding_ln: a norm right after the embedding.
        embedding_scale: token embeddings are multiplied by it.
        logit_scale: logits are multiplied by it, before the soft-cap.
        unembed_act_fn: a linear layer from `d_model` to `d_model`, this activation function and a norm stand between
            the final norm and the unembedding; None for no such layer.
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
        query_scale_beta, query_scale_ctx_len: queries at position p, once rotated, are multiplied by
            `1 + query_scale_beta * ln(1 + floor(p / query_scale_ctx_len))`, so that the softmax stays sharp in long
            contexts (Llama 4, Ministral 3). Off when the first is 0.
        clip_qkv: queries, keys and values are kept within plus and minus this.
        attention_sinks: each head has a learned score, `attn.sinks`, that takes a share of the softmax and gives
            nothing, so that a pattern's rows sum to less than one.
        attention_gate: z is multiplied by `attn.hook_gate`, the sigmoid of `x W_G + b_G`, where `x` is what attention
            reads (Qiu et al. 2025, "Gated Attention for Large Language Models").
        d_latent_kv: keys and values are read from a latent of this width, which is compressed from the stream and
            normalised; a head's first `rotary_dim` dimensions of its keys are read from the stream itself, the same
            for all heads (multi-head latent attention, DeepSeek-AI 2024, "DeepSeek-V2"). None for no latent.
        d_latent_q: queries are read from a latent of this width too; None if they are read from the stream.
        d_value: width of a head's values and of its z in latent attention; `d_head` by default.
        latent_eps: `eps` of the norms of latents.
        num_experts, experts_per_token: mixture of experts, and how many of them a token uses.
        identity_experts: the last so many of the experts have no weights and give back what they read.
        shortcut_experts: blocks are joined in pairs. The first of a pair has experts beside its dense MLP,
            `shortcut`, and the second adds what they write to what its own MLP writes (shortcut-connected experts,
            Meituan 2025, "LongCat-Flash Technical Report").
        moe_layers: per layer whether it has experts rather than one dense MLP; all by default.
        d_expert: hidden width of an expert; `d_mlp` by default.
        d_shared_expert: hidden width of the shared expert, which every token uses; None for none.
        shared_expert_gate: the output of the shared expert is multiplied by a sigmoid of `x W_shared_gate`.
        norm_topk_prob: the chosen experts' weights are rescaled to sum to one (in Mixtral, Qwen3 MoE and most others).
        norm_topk_min: the least sum that they are divided by.
        routed_scale: the chosen experts' weights are multiplied by it in the end.
        router_scores: an expert's weight is the `"softmax"` of the router's scores, or the `"sigmoid"` of its own.
        router_correction: each expert has a number, `mlp.b_correction`, that is added to its weight where experts are
            chosen, and not where they are weighted (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing").
        expert_groups, expert_groups_per_token: experts stand in so many groups, and a token chooses among the experts
            of so many of them (DeepSeek-AI 2024, "DeepSeek-V2"); None for no groups.
        expert_group_score: a group is chosen by the weight of its best expert, `"max"`, or the sum of the best two,
            `"top2"`.
        router_in_float32: the router's scores are computed in float32 in a model of lower precision.
        sparsemixer_jitter: experts are weighted as SparseMixer does (Liu et al. 2024, "GRIN"), with this tolerance.
        gated_limit: in experts, `act(min(gate, limit)) * (clamp(linear, -limit, limit) + 1)` instead of
            `act(gate) * linear`.
        init_mode, initializer_range, init_weights, seed: how a new model's weights are drawn. An `initializer_range` of
            -1 means `0.8 / sqrt(d_model)` for `"gpt2"` and a gain of 1 for the others.
        n_params: weights of attention and MLPs, counted whatever is given.
        dtype, device: of a new model's parameters.
        default_prepend_bos, default_padding_side, tokenizer_name: about text.
        tokenizer_prepends_bos: whether the model's tokenizer puts BOS in front, as `default_prepend_bos` says; None
            without a tokenizer, or with one that does not follow the config.
        model_name, original_architecture, from_checkpoint, checkpoint_index, checkpoint_label_type, checkpoint_value:
            where the weights come from.
        use_attn_result, use_split_qkv_input, use_attn_in, use_hook_mlp_in, use_hook_tokens: whether a cache without
            `names_filter` records these activations. Their hook points exist in any case.
        ungroup_grouped_query_attention: keys and values, their hook points and the copies of the stream for them have
            an entry for each query head, rather than for each key-value head.

    Raises:
        ValueError: a value out of range, or fields that contradict each other.
        TypeError: an unknown field.
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
    first_norm: bool = True
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
    unembed_act_fn: str | None = None
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
    query_scale_beta: float = 0.0
    query_scale_ctx_len: int = 8192
    clip_qkv: float | None = None
    attention_sinks: bool = False
    attention_gate: bool = False
    d_latent_kv: int | None = None
    d_latent_q: int | None = None
    d_value: int | None = None
    latent_eps: float = 1e-6
    num_experts: int | None = None
    experts_per_token: int | None = None
    identity_experts: int = 0
    shortcut_experts: bool = False
    moe_layers: list[bool] | None = None
    d_expert: int | None = None
    d_shared_expert: int | None = None
    shared_expert_gate: bool = False
    norm_topk_prob: bool = False
    norm_topk_min: float = 0.0
    routed_scale: float = 1.0
    router_scores: str = "softmax"
    router_correction: bool = False
    expert_groups: int | None = None
    expert_groups_per_token: int | None = None
    expert_group_score: str = "top2"
    router_in_float32: bool = False
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
        fill_and_check(self)

    # Derived from the fields

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads: `n_key_value_heads`, or `n_heads` where queries are not grouped."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def n_hooked_kv_heads(self) -> int:
        """Key-value heads at hook points: one for each query head with `ungroup_grouped_query_attention`."""
        return self.n_heads if self.ungroup_grouped_query_attention else self.n_kv_heads

    @property
    def value_width(self) -> int:
        """The width of a head's values: `d_value`, or `d_head` where that is not given."""
        return self.d_head if self.d_value is None else self.d_value

    def attention_widths(self, *, of_values: bool = False) -> dict[str, int | None]:
        """Return the widths of what a head reads, by the names of the axes; None for a latent that there is not.

        Args:
            of_values: at the hook points of values and z, whose last axis is named `d_head` in every model.
        """
        latents = {"d_latent_kv": self.d_latent_kv, "d_latent_q": self.d_latent_q}
        d_head = self.value_width if of_values else self.d_head
        return {"d_head": d_head, "d_value": self.value_width, **latents}

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        if self.num_experts is None or self.shortcut_experts:
            return False
        return self.moe_layers is None or self.moe_layers[layer]

    def has_shortcut(self, layer: int) -> bool:
        """Whether a layer has experts beside its MLP, whose output the next layer adds."""
        return self.shortcut_experts and layer % 2 == 0

    def adds_experts(self, layer: int) -> bool:
        """Whether what a layer's MLP adds to the stream holds the output of experts."""
        return self.has_experts(layer) or (self.shortcut_experts and layer % 2 == 1)

    def writes_normalized(self, layer: int) -> bool:
        """Whether a layer has experts that write what `ln2` gives them, so that its gain cannot be folded."""
        return self.identity_experts > 0 and (self.has_experts(layer) or self.has_shortcut(layer))

    def within_pair(self, layer: int) -> bool:
        """Whether the stream at the input of a layer is not all that the layer needs of those before it."""
        return self.shortcut_experts and layer % 2 == 1

    def pair_of(self, layer: int) -> range:
        """Return the layers that run whenever a layer runs, itself included."""
        first = layer - 1 if self.within_pair(layer) else layer
        return range(first, self.stop_after(first))

    def stop_after(self, layer: int) -> int:
        """Return the first `stop_at_layer` of a run that a layer is part of."""
        return layer + 2 if self.within_pair(layer + 1) else layer + 1

    @property
    def weighted_experts(self) -> int:
        """How many of the experts have weights."""
        return (self.num_experts or 0) - self.identity_experts

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
        """Whether the output of attention and MLP passes a norm before the next part reads it."""
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
        """Return the factor on the attention scores of a layer."""
        scale = 1.0 / self.attn_scale if self.use_attn_scale else 1.0
        return scale / ((layer + 1) if self.scale_attn_by_inverse_layer_idx else 1)

    def is_layer_norm_activation(self) -> bool:
        """Whether the MLP has a layer norm after its activation function (`solu_ln`)."""
        return self.act_fn == "solu_ln"

    # In and out

    def to_dict(self) -> ConfigDict:
        """Return every field as plain data that JSON can hold; `from_dict` reads it back."""
        fields = {name: plain(value) for name, value in dataclasses.asdict(self).items()}
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return fields

    @classmethod
    def from_dict(cls, config_dict: ConfigDict) -> HookedTransformerConfig:
        """Build a config from a dictionary, also one saved by the classic library.

        Raises:
            ValueError: a required field is missing, or a retired field asks for something that is not supported.
            TypeError: an unknown field.
        """
        if not isinstance(config_dict, dict):
            raise TypeError(f"a config is built from a dictionary, got {type(config_dict).__name__}")
        fields = dict(completed(config_dict))
        missing = [name for name in ("n_layers", "d_model", "n_ctx") if name not in fields]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}; it has {sorted(fields)}")
        return cls(**fields)

    @classmethod
    def unwrap(cls, config: HookedTransformerConfig | ConfigDict) -> HookedTransformerConfig:
        """Return a config from a config or a dictionary."""
        return cls.from_dict(config) if isinstance(config, dict) else config

    def replace(self, **changes: FieldValue) -> HookedTransformerConfig:
        """Return a copy with some fields changed, validated anew; defaults that follow from them follow."""
        refilled = self._defaults_to_refill()
        # These two fields name one thing: the one among the changes decides.
        if "norm_placement" in changes:
            refilled["use_normalization_before_and_after"] = False
        elif "use_normalization_before_and_after" in changes and self.norm_placement == "before_and_after":
            refilled["norm_placement"] = "before"
        return dataclasses.replace(self, **{**refilled, **changes})

    def _defaults_to_refill(self) -> ConfigDict:
        """The fields that hold a default computed from other fields, each with the value that has it computed."""
        gpt2_range = 0.8 / math.sqrt(self.d_model)
        follows: dict[str, tuple[bool, FieldValue]] = {
            "d_mlp": (self.d_mlp == 4 * self.d_model and not self.attn_only, None),
            "d_vocab_out": (self.d_vocab_out == self.d_vocab, -1),
            "attn_scale": (self.attn_scale == math.sqrt(self.d_head), -1.0),
            "rotary_dim": (self.rotary_dim == self.d_head, None),
            "initializer_range": (self.init_mode == "gpt2" and self.initializer_range == gpt2_range, -1.0),
        }
        return {name: refill for name, (is_default, refill) in follows.items() if is_default}


def _check_before(init: Callable[..., None]) -> Callable[..., None]:
    known = [known_field.name for known_field in dataclasses.fields(HookedTransformerConfig)]

    @functools.wraps(init)
    def checked_init(self: HookedTransformerConfig, **fields: object) -> None:
        init(self, **checked_fields(fields, known))

    return checked_init


HookedTransformerConfig.__init__ = _check_before(HookedTransformerConfig.__init__)  # type: ignore[method-assign]
