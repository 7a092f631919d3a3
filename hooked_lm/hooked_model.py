"""HookedModel: the attributes and methods of a model that sweeps, patching, circuits, caches and tracing use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from torch import Tensor, nn

from hooked_lm.components import Embed, PosEmbed, TransformerBlock, Unembed
from hooked_lm.components.ranks import Ranks
from hooked_lm.components.spread import Spread
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooks import HookFunction, HookHandle, HookPoint, HookSpec, ModelOutput
from hooked_lm.interventions import Intervention
from hooked_lm.tokenization import LogitTokens, Prompts, Tokenizer

if TYPE_CHECKING:
    from hooked_lm.activation_cache import ActivationCache

__all__ = ["HookedModel"]


class HookedModel(Protocol):
    """A `HookedTransformer`, or another model with its hook points, blocks and methods.

    Functions that run a model are annotated with this protocol, and use nothing of the model besides.

    Attributes:
        cfg: the architecture.
        hook_dict: full hook name -> hook point, in the order in which they run.
        blocks, embed, pos_embed, ln_final, unembed: the parts of the network. `pos_embed` only with learned positions.
        tokenizer: None for a model whose input is tokens only.
        processed: the processing steps applied to the weights, by name.
        ranks: the processes that share out its heads and neurons; None for a model that has them all.
        spread_over: the devices of a model that is on several; None for one device.
    """

    cfg: HookedTransformerConfig
    hook_dict: dict[str, HookPoint]
    embed: Embed
    pos_embed: PosEmbed
    ln_final: nn.Module
    unembed: Unembed
    processed: tuple[str, ...]
    spread_over: Spread | None
    ranks: Ranks | None

    @property
    def blocks(self) -> Sequence[TransformerBlock]: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def W_E(self) -> Tensor: ...

    @property
    def W_U(self) -> Tensor: ...

    @property
    def b_U(self) -> Tensor: ...

    # Running. Any: the options are named parameters of the model's methods, each of its own type.

    def __call__(self, input: Prompts, **options: Any) -> ModelOutput: ...

    def run(self, input: Prompts, *, interventions: Sequence[Intervention] = (), **options: Any) -> ModelOutput: ...

    def run_with_hooks(self, input: Prompts, **options: Any) -> ModelOutput: ...

    @overload
    def run_with_cache(
        self, input: Prompts, *, return_cache_object: Literal[True] = True, **options: Any
    ) -> tuple[ModelOutput, ActivationCache]: ...

    @overload
    def run_with_cache(
        self, input: Prompts, *, return_cache_object: Literal[False], **options: Any
    ) -> tuple[ModelOutput, dict[str, Tensor]]: ...

    def logits_of(self, residual: Tensor, logits_to_keep: int | slice | Tensor | None = None) -> Tensor: ...

    def tokens_and_mask(
        self,
        input: Prompts,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...

    def layer_range(self, start: int | None, stop: int | None) -> tuple[int, int]: ...

    # Hooks

    def hook_points(self) -> Iterable[HookPoint]: ...

    def hooks(
        self, fwd_hooks: Sequence[HookSpec] = (), bwd_hooks: Sequence[HookSpec] = ()
    ) -> AbstractContextManager[object]: ...

    def attached(self, handles: Sequence[HookHandle]) -> AbstractContextManager[None]: ...

    def recording_handles(
        self,
        fwd: Sequence[tuple[str, HookFunction]],
        bwd: Sequence[tuple[str, HookFunction]],
        level: int | None = None,
        this_thread: bool = False,
    ) -> list[HookHandle]: ...

    def clear_contexts(self) -> None: ...

    def only_hooks(self, handles: Iterable[HookHandle]) -> AbstractContextManager[None]: ...

    def intervening(self, interventions: Sequence[Intervention]) -> AbstractContextManager[object]: ...

    # Text

    def to_tokens(self, input: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor: ...

    def to_string(self, tokens: Tensor | Sequence[int] | int) -> str | list[str]: ...

    def to_str_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]: ...

    def to_single_token(self, string: str) -> int: ...

    def to_single_str_token(self, int_token: int) -> str: ...

    def tokens_to_residual_directions(self, tokens: LogitTokens) -> Tensor: ...

    # Methods of every nn.Module

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...
