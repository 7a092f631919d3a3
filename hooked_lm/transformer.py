"""HookedTransformer: the model's constructor and forward pass; its other methods are in packages."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_lm import tokenization
from hooked_lm._support.integers import integer
from hooked_lm._support.plain_data import PlainData
from hooked_lm.activation_cache.recording import Caching
from hooked_lm.components import Embed, PosEmbed, SequenceLayout, TransformerBlock, Unembed
from hooked_lm.components.by_hand import call_own
from hooked_lm.components.embed import unembedding_is_live
from hooked_lm.components.norm import NoNorm, make_norm
from hooked_lm.components.sequence import Prompt, kept_index, kept_positions
from hooked_lm.components.shortcut import ShortcutBlock, make_block
from hooked_lm.components.stock import register_stock
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.defaults import defaults
from hooked_lm.generation.methods import TextGeneration
from hooked_lm.hooks import HookPoint, current_pass, in_pass, is_live, new_pass
from hooked_lm.kv_cache import HookedTransformerKeyValueCache
from hooked_lm.losses import lm_cross_entropy_loss
from hooked_lm.tokenization import Prompts, Tokenizer
from hooked_lm.tokenization.inputs import InputReading
from hooked_lm.tracing.methods import Tracing
from hooked_lm.weights.initialization import initialize_weights
from hooked_lm.weights.saving import WeightSaving
from hooked_lm.weights.spreading import Spreading

__all__ = ["ForwardOutput", "HookedTransformer", "Loss", "ModelInput", "Output", "ReturnType"]

ReturnType = Literal["logits", "loss", "both"] | None
ModelInput = Prompts
Loss = Tensor  # a number, or one for each position: [batch pos-1]


class Output(NamedTuple):
    """What a run returns with `return_type="both"`: logits [batch pos vocab] and loss."""

    logits: Tensor
    loss: Loss


ForwardOutput = Tensor | Output | None


class HookedTransformer(Spreading, WeightSaving, InputReading, TextGeneration, Caching, Tracing):
    """A transformer with a named hook point at every activation.

    Args:
        cfg: the architecture, as a config or a dictionary of its fields.
        tokenizer: a HuggingFace tokenizer, needed for strings. With `cfg.tokenizer_name`, that one is loaded.
        move_to_device: move the parameters to `cfg.device`, if given.
        default_padding_side: overrides the config's.

    Raises:
        ValueError: `d_vocab` is missing and there is no tokenizer to take it from.
    """

    def __init__(
        self,
        cfg: HookedTransformerConfig | PlainData,
        tokenizer: Tokenizer | None = None,
        move_to_device: bool = True,
        default_padding_side: Literal["left", "right"] | None = None,
    ) -> None:
        super().__init__()
        cfg = HookedTransformerConfig.unwrap(cfg)
        if tokenizer is None and cfg.tokenizer_name is not None:
            tokenizer = self._load_tokenizer(cfg.tokenizer_name)
        self._cfg = cfg = _with_vocabulary(cfg, tokenizer)
        if default_padding_side is not None:
            tokenization.check_padding_side(default_padding_side)
            cfg.default_padding_side = default_padding_side
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

        self.hook_tokens = HookPoint("batch pos", differentiable=False, flag="use_hook_tokens")
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint("batch pos d_model")
        if cfg.positional_embedding_type in ("standard", "shortformer"):
            self.pos_embed = PosEmbed(cfg)
            self.hook_pos_embed = HookPoint("batch pos d_model")
        blocks = [make_block(cfg, layer) for layer in range(cfg.n_layers)]
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.ln_final = make_norm(cfg, kind=_final_norm_kind(cfg)) if cfg.final_norm else NoNorm()
        self.unembed = Unembed(cfg, tied_to=self.embed if cfg.tie_word_embeddings else None)
        device = cfg.device or defaults().device()  # read first: `self.to` sets cfg.device to the parameters' device
        self.to(cfg.dtype)
        if cfg.init_weights:
            initialize_weights(self, cfg)
        if move_to_device and device is not None:
            self.to(device)
        self.setup()
        self._lock_config()

    # The config

    @property
    def cfg(self) -> HookedTransformerConfig:
        """The config. The forward pass computes with its values.

        Fields that take effect when they are changed may be assigned: the soft caps, `attention_dir`, `n_ctx`, dtype,
        device and the defaults of tokens. Every other assignment raises, with how to build such a model.
        """
        return self._cfg

    @cfg.setter
    def cfg(self, cfg: HookedTransformerConfig) -> None:
        raise AttributeError(
            "a model keeps the config it was built with: assign a field of it (model.cfg.n_ctx = ...), or build "
            "another model, HookedTransformer(cfg)"
        )

    def _lock_config(self) -> None:
        """Make the config refuse changes without effect, and move this model when its dtype or device is assigned."""
        model = weakref.ref(self)

        def moved(name: str, value: object) -> None:
            owner = model()
            if owner is not None:
                owner.to(dtype=value) if isinstance(value, torch.dtype) else owner.to(device=str(value))

        self._cfg.lock(moved)

    def __setstate__(self, state: PlainData) -> None:
        # A copied config is unlocked, so the copied model locks its own.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self._cfg.is_locked:  # a shallow copy shares it
            self._lock_config()

    # The forward pass

    def forward(
        self,
        input: ModelInput,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: HookedTransformerKeyValueCache | None = None,
        logits_to_keep: int | slice | Tensor | None = None,
        shortformer_pos_embed: Tensor | None = None,
    ) -> ForwardOutput:
        """Return the model's logits, its loss, or the residual stream before a layer.

        Args:
            input: a string, a list of strings, tokens [pos] or [batch pos], or with `start_at_layer` the residual
                stream [batch pos d_model] at the input of that block.
            return_type: `"logits"` [batch pos vocab]; `"loss"`, the mean next-token loss in nats; `"both"`, an
                `Output`; None runs up to the final norm and returns None.
            loss_per_token: return the loss as [batch pos-1].
            prepend_bos: for strings; by default the model's. It never applies to tokens.
            padding_side: for strings, and to infer padding in tokens without a mask; by default the model's.
            start_at_layer: the first block to run; negative counts from the end.
            tokens: with `start_at_layer`, the tokens [batch pos] that a loss needs.
            attention_mask: [batch pos], 0 at padding. By default it follows from the padding of the strings, or from a
                run of padding tokens on the padding side, on the right only with a key-value cache: see
                `tokenization.infer_cached_padding`.
            stop_at_layer: the first block not to run; the residual stream at its input is returned. 0 is embeddings
                only, `n_layers` is all blocks without the final norm, negative counts from the end.
            past_kv_cache: keys and values of earlier positions; extended by this call.
            logits_to_keep: compute logits for the last so many positions, or for a slice or index of positions.
            shortformer_pos_embed: with `start_at_layer`, positions [batch pos d_model] to add to the inputs of queries
                and keys in place of the model's own, of which a shortformer model needs none given.

        Raises:
            TypeError: an input of another type.
            ValueError: tokens out of range, too long a sequence, layers out of range, shapes that do not match, or
                options that exclude each other.
        """
        start, stop = self.layer_range(start_at_layer, stop_at_layer)
        _check_return(return_type, stop_at_layer, logits_to_keep, loss_per_token)
        if past_kv_cache is not None:
            self._check_cacheable(past_kv_cache, start, stop)
        with nullcontext() if past_kv_cache is None else _rewound_on_error(past_kv_cache):
            prompt = self._prompt(
                input, prepend_bos, padding_side, attention_mask, past_kv_cache, start_at_layer, tokens
            )
            if shortformer_pos_embed is not None:
                prompt = prompt.with_positions(shortformer_pos_embed)
            with in_pass(new_pass(prompt.layout.n_past, prompt.layout.real_queries)):
                return self._pass(
                    prompt, start, stop, past_kv_cache, stop_at_layer, logits_to_keep, return_type, loss_per_token
                )

    def _pass(
        self,
        prompt: Prompt,
        start: int,
        stop: int,
        past_kv_cache: HookedTransformerKeyValueCache | None,
        stop_at_layer: int | None,
        logits_to_keep: int | slice | Tensor | None,
        return_type: ReturnType,
        loss_per_token: bool,
    ) -> ForwardOutput:
        """Run embedding, blocks and unembedding, as far as the options select them."""
        prompt, residual, shortformer_pos = self._entered(prompt)
        layout, over = prompt.layout, self.spread_over
        for layer, block in enumerate(islice(self.blocks, start, stop), start):
            past = None if past_kv_cache is None else past_kv_cache[layer]
            if over is not None:
                residual, layout, shortformer_pos = over.entering(layer, residual, layout, shortformer_pos)
            if type(block) in (TransformerBlock, ShortcutBlock):
                residual = block(residual, layout, past, shortformer_pos)
            else:
                residual = call_own(block, (residual,), layout, past, shortformer_pos)
        if over is not None:
            residual = residual.to(over.home)
        if stop_at_layer is not None:
            return residual
        normalized = self.ln_final(residual)
        if return_type is None and not unembedding_is_live(self.unembed):
            return None
        logits = self._unembedded(normalized, logits_to_keep)
        return self._output(logits, prompt.tokens, prompt.mask, return_type, loss_per_token)

    def logits_of(self, residual: Tensor, logits_to_keep: int | slice | Tensor | None = None) -> Tensor:
        """Return the logits of the residual stream after the last block: final norm, then unembedding.

        Args:
            residual: [batch pos d_model].
            logits_to_keep: as for `forward`.
        """
        return self._unembedded(self.ln_final(residual), logits_to_keep)

    def _unembedded(self, normalized: Tensor, logits_to_keep: int | slice | Tensor | None) -> Tensor:
        """Run the unembedding on the positions to keep."""
        index = None if logits_to_keep is None else kept_index(logits_to_keep, normalized.shape[1])
        kept = normalized if index is None else normalized[:, index]
        logits: Tensor
        if kept is normalized or not unembedding_is_live(self.unembed):
            logits = self.unembed(kept)
        else:
            # Positions of hooks there count in the text, not among those kept.
            positions = kept_positions(logits_to_keep, normalized.shape[1])
            with in_pass(replace(current_pass(), kept=positions)):
                logits = self.unembed(kept)
        return logits

    def _output(
        self, logits: Tensor, tokens: Tensor | None, mask: Tensor | None, return_type: ReturnType, per_token: bool
    ) -> ForwardOutput:
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("a loss from a residual stream needs tokens=, the tokens of that stream")
        loss = self.loss_fn(logits, tokens, mask, per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _check_cacheable(self, cache: HookedTransformerKeyValueCache, start: int, stop: int) -> None:
        if self.cfg.attention_dir == "bidirectional":
            raise ValueError(
                "a bidirectional model cannot use a key-value cache: earlier positions attend to later ones"
            )
        if (start, stop) != (0, self.cfg.n_layers) and not cache.frozen:
            raise ValueError(
                "a key-value cache needs every layer: start_at_layer and stop_at_layer would leave some without keys"
            )

    def layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """Return the first block that runs and the first block that does not, for these options of `forward`.

        Args:
            start: `start_at_layer` of `forward`.
            stop: `stop_at_layer` of `forward`.

        Raises:
            TypeError: one is no integer.
            ValueError: one is out of range or between two blocks that run together (`shortcut_experts`), or they are in
                the wrong order.
        """
        n_layers = self.cfg.n_layers
        start = None if start is None else integer(start, "start_at_layer")
        stop = None if stop is None else integer(stop, "stop_at_layer")
        if start is not None and not -n_layers <= start < n_layers:
            raise ValueError(f"start_at_layer {start} is out of range: this model has blocks 0-{n_layers - 1}")
        if stop is not None and not -n_layers <= stop <= n_layers:
            raise ValueError(f"stop_at_layer {stop} is out of range: it goes from -{n_layers} to {n_layers}")
        first = 0 if start is None else start % n_layers
        last = n_layers if stop is None else stop + n_layers if stop < 0 else stop
        if start is not None and last < first:
            raise ValueError(f"stop_at_layer {stop} comes before start_at_layer {start}")
        for name, layer in (("start_at_layer", first), ("stop_at_layer", last)):
            if self.cfg.within_pair(layer):
                raise ValueError(
                    f"{name} {layer} is between blocks {layer - 1} and {layer}, which run together: the output of "
                    f"experts goes from one to the other beside the stream. Give {layer - 1} or {layer + 1}"
                )
        return first, last

    def _entered(self, prompt: Prompt) -> tuple[Prompt, Tensor, Tensor | None]:
        """Return the prompt, with its tokens after hooks; the residual at the first block; shortformer positions."""
        layout = prompt.layout
        if prompt.residual is not None:
            return prompt, prompt.residual, self._shortformer_pos(prompt, prompt.residual[:, :, 0])
        tokens = prompt.tokens
        assert tokens is not None
        if is_live(self.hook_tokens):
            # Hooks get a copy, so that a tensor they keep does not share memory with the caller's tokens.
            tokens = self._check_tokens(self.hook_tokens(tokens.clone()))
            prompt = replace(prompt, tokens=tokens)
        residual = self.hook_embed(self.embed(tokens))
        like = tokens
        has_positions = self.cfg.positional_embedding_type in ("standard", "shortformer")
        if has_positions and residual.shape[0] != tokens.shape[0] and not is_live(self.hook_pos_embed):
            # Hooks at hook_embed have changed the number of prompts; hooks at hook_pos_embed would do so themselves.
            like = tokens.new_zeros(residual.shape[:2])
        shortformer_pos = self._shortformer_pos(prompt, like)
        if self.cfg.positional_embedding_type == "standard":
            residual = residual + self._positions(layout, like)
        return prompt, residual, shortformer_pos

    def _shortformer_pos(self, prompt: Prompt, like: Tensor) -> Tensor | None:
        shortformer = self.cfg.positional_embedding_type == "shortformer"
        if shortformer and prompt.shortformer_pos is None:
            return self._positions(prompt.layout, like)
        return prompt.shortformer_pos

    def _positions(self, layout: SequenceLayout, like: Tensor) -> Tensor:
        positions = self.pos_embed(like, layout.n_past, layout.valid)
        # Hooks get a copy: the positions are a view of `W_pos`, which training writes to.
        return self.hook_pos_embed(positions.clone()) if is_live(self.hook_pos_embed) else positions

    def input_to_embed(
        self,
        input: ModelInput,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        attention_mask: Tensor | None = None,
        past_kv_cache: HookedTransformerKeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return (residual at block 0, tokens, shortformer positions or None, attention mask or None).

        Args:
            input, prepend_bos, padding_side, attention_mask, past_kv_cache: as for `forward`.
        """
        with _rewound_on_error(past_kv_cache):
            prompt = self._prompt(input, prepend_bos, padding_side, attention_mask, past_kv_cache, None, None)
            with in_pass(new_pass(prompt.layout.n_past)):
                entered, residual, shortformer_pos = self._entered(prompt)
        assert entered.tokens is not None
        return residual, entered.tokens, shortformer_pos, entered.mask

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos vocab"],
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return the next-token loss in nats; see `losses.lm_cross_entropy_loss`.

        Args:
            logits: [batch pos vocab].
            tokens: [batch pos].
            attention_mask: [batch pos], 0 at padding.
            per_token: return the loss as [batch pos-1] instead of its mean.

        Raises:
            ValueError: there is a single position, the mask leaves no two adjacent real tokens, logits and tokens do
                not fit each other, or this model's logits are not those of its tokens (`d_vocab_out`).
        """
        if self.cfg.d_vocab_out != self.cfg.d_vocab:
            raise ValueError(
                f"a next-token loss reads the logits of the next tokens, and this model has logits of "
                f"d_vocab_out={self.cfg.d_vocab_out} classes for d_vocab={self.cfg.d_vocab} tokens: take its logits "
                "(return_type='logits') and compute the loss from labels of your own"
            )
        if tokens.shape[1] < 2:
            raise ValueError("a next-token loss needs at least two positions")
        if attention_mask is not None:
            attention_mask = attention_mask.to(logits.device, torch.long)
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def new_kv_cache(self, batch_size: int = 1, capacity: int = 0) -> HookedTransformerKeyValueCache:
        """Return an empty key-value cache for this model, with room for `capacity` positions; it grows beyond.

        Args:
            batch_size: the number of prompts.
            capacity: the number of positions to allocate.
        """
        home, over = self.embed.W_E.device, self.spread_over
        # A rank keeps the keys and values of its own heads.
        cfg = self.blocks[0].cfg if self.ranks is not None else self.cfg
        return HookedTransformerKeyValueCache.init_cache(
            cfg, home, batch_size, capacity, None if over is None else over.blocks
        )

    # Housekeeping

    def init_weights(self) -> None:
        """Draw the weights anew by `cfg.init_mode`, with `cfg.seed` the same ones; biases become zero, gains one."""
        initialize_weights(self, self.cfg)
        self.processed = ()

    def to(self, *args: object, print_details: bool = True, **kwargs: object) -> Self:
        """Move the model to a device, or change its precision; return it.

        Args:
            *args, **kwargs: as for `torch.nn.Module.to`.
            print_details: taken for code of the classic library, and without effect: nothing is printed.
        """
        return super().to(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    def mps(self) -> HookedTransformer:
        """Move the model to Apple's GPU."""
        return self.to("mps")

    # Flags that say what a cache without `names_filter` records. Every hook point exists whatever their values.

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Set `cfg.use_attn_result`: whether a cache without `names_filter` records `hook_result`."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Set `cfg.use_split_qkv_input`: whether a cache without `names_filter` records each head's inputs."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Set `cfg.use_attn_in`: whether a cache without `names_filter` records `hook_attn_in`."""
        self.cfg.use_attn_in = use_attn_in

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Set `cfg.use_hook_mlp_in`: whether a cache without `names_filter` records `hook_mlp_in`."""
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Set `cfg.ungroup_grouped_query_attention`: keys and values have an entry for each query head, or not."""
        self.cfg.ungroup_grouped_query_attention = ungroup_grouped_query_attention

    @property
    def n_params_total(self) -> int:
        """All parameters, embeddings, biases and norms included."""
        return sum(parameter.numel() for parameter in self.parameters())


register_stock(HookedTransformer)


def _with_vocabulary(cfg: HookedTransformerConfig, tokenizer: Tokenizer | None) -> HookedTransformerConfig:
    """Return a copy of the config, with `d_vocab` from the tokenizer if the config has none."""
    if cfg.d_vocab != -1:
        return cfg.replace()
    if tokenizer is None:
        raise ValueError("d_vocab is missing from the config: give it, or a tokenizer to take it from")
    return cfg.replace(d_vocab=max(tokenizer.get_vocab().values()) + 1)


def _final_norm_kind(cfg: HookedTransformerConfig) -> str | None:
    if not cfg.final_rms or cfg.normalization_type is None:
        return cfg.normalization_type
    return "RMSPre" if cfg.normalization_type.endswith("Pre") else "RMS"


def _check_return(return_type: object, stop: int | None, logits_to_keep: object, loss_per_token: bool) -> None:
    if return_type not in ("logits", "loss", "both", None):
        raise ValueError(f"return_type is 'logits', 'loss', 'both' or None, not {return_type!r}")
    wants_loss = return_type in ("loss", "both")
    if wants_loss and stop is not None:
        raise ValueError(f"stop_at_layer returns the residual stream, so there is no {return_type!r} to return")
    if wants_loss and logits_to_keep is not None:
        raise ValueError("a loss needs the logits of every position: logits_to_keep does not go with it")
    if loss_per_token and not wants_loss:
        raise ValueError(f"loss_per_token needs return_type 'loss' or 'both', not {return_type!r}")


@contextmanager
def _rewound_on_error(cache: HookedTransformerKeyValueCache | None) -> Generator[None, None, None]:
    """Remove the positions that a failed run has added to a key-value cache."""
    length = 0 if cache is None else cache.length
    try:
        yield
    except BaseException:
        if cache is not None:
            cache.rewind(length)
        raise
