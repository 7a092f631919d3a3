"""The token embedding and the unembedding, with the layer that a few models have before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_lm._support.torch_internals import transforms_active
from hooked_lm.components.activations import ACTIVATION_FUNCTIONS, soft_cap
from hooked_lm.components.linear import linear
from hooked_lm.components.norm import NoNorm, Norm, make_norm, make_writing_norm
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.classic import ConfigDict
from hooked_lm.hooks import HookHolder, HookPoint, any_live

__all__ = ["Embed", "Unembed", "UnembedTransform", "unembedding_is_live"]

_UNTIE_FIRST = "may give W_U beside tied embeddings if they are untied before: call unembed.untie() first"


class Embed(nn.Module):
    """Token embedding, `W_E` [d_vocab d_model] times `embedding_scale`, with a norm after it if `post_embedding_ln`."""

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict) -> None:
        super().__init__()
        self.cfg = cfg = _with_vocabulary(cfg)
        self.scale = cfg.embedding_scale
        self.W_E = nn.Parameter(torch.zeros(cfg.d_vocab, cfg.d_model))
        self.ln = make_writing_norm(cfg) if cfg.post_embedding_ln else NoNorm()

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        embedded = F.embedding(tokens, self.W_E)
        # The factor is rounded to the model's precision first, as checkpoints in low precision were trained with.
        scaled: Tensor = self.ln(embedded if self.scale == 1.0 else embedded * embedded.new_tensor(self.scale))
        return scaled


class UnembedTransform(HookHolder):
    """`norm(act(x W_dense + b_dense))`, with W_dense [d_model d_model]: the head of BERT (Devlin et al. 2019).

    `hook_pre` is before the activation function, `hook_post` after; the unembedding's `hook_in` is after the norm.
    """

    def __init__(self, cfg: HookedTransformerConfig) -> None:
        super().__init__()
        self.W_dense = nn.Parameter(torch.empty(cfg.d_model, cfg.d_model))
        self.b_dense = nn.Parameter(torch.zeros(cfg.d_model))
        self.act_fn = ACTIVATION_FUNCTIONS[str(cfg.unembed_act_fn)]
        self.hook_pre = HookPoint("batch pos d_model")
        self.hook_post = HookPoint("batch pos d_model")
        self.ln = make_norm(cfg)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos d_model"]:
        post = self.hook_post(self.act_fn(self.hook_pre(linear(x, self.W_dense.T, self.b_dense))))
        return self.ln(post)  # type: ignore[no-any-return]


class Unembed(HookHolder):
    """From the normalised residual stream to logits: `W_U` [d_model d_vocab_out], `b_U` [d_vocab_out].

    `hook_out` has the logits that the model returns, after `logit_scale` and the soft-cap. With `unembed_act_fn` the
    stream first passes `transform`, an `UnembedTransform`, so that logits are not linear in it.

    Tied embeddings are one tensor, and this module has no parameter `W_U`, until somebody asks for it: whoever has a
    parameter may write to it, or give it to an optimizer. From then on it is a parameter of its own. `matrix()` reads
    the values without untying.

    Args:
        cfg: the architecture.
        tied_to: the embedding whose transpose is `W_U`.
    """

    def __init__(self, cfg: HookedTransformerConfig | ConfigDict, tied_to: Embed | None = None) -> None:
        super().__init__()
        self.cfg = cfg = _with_vocabulary(cfg)
        self.scale = cfg.logit_scale
        # In a tuple, so that the embedding is not registered as a submodule.
        self._tied_to = None if tied_to is None else (tied_to,)
        if tied_to is None:
            self.W_U = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_vocab_out))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab_out))
        self.transform = None if cfg.unembed_act_fn is None else UnembedTransform(cfg)
        self.hook_in = HookPoint("batch pos d_model")
        self.hook_out = HookPoint("batch pos vocab")

    @property
    def cap(self) -> float:
        """The logits' soft-cap, off if not positive: `cfg.output_logits_soft_cap`, which may be assigned."""
        return self.cfg.output_logits_soft_cap

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "out_batch pos vocab"]:
        return self.hook_out(self.scaled(linear(self.hook_in(self.transformed(x)), self._by_token(), self._bias())))

    def transformed(self, x: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*out_lead d_model"]:
        """Return what `W_U` reads of a normalised stream."""
        return x if self.transform is None else self.transform(x)

    def scaled(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return logits with `logit_scale` and the soft-cap applied, if the model has them."""
        return soft_cap(logits if self.scale == 1.0 else logits * self.scale, self.cap)

    def of_tokens(
        self, x: Float[Tensor, "cell batch d_model"], tokens: Int[Tensor, "batch_or_1 token"]
    ) -> Float[Tensor, "cell batch token"]:
        """Return the logits of a few tokens only, without calling hooks.

        Args:
            x: normalised residuals.
            tokens: for each prompt, or one row for all.
        """
        directions = self._by_token()[tokens].expand(x.shape[1], -1, -1)
        logits = einsum(self.transformed(x), directions, "cell batch d_model, batch token d_model -> cell batch token")
        return self.scaled(logits + self.b_U[tokens])

    def matrix(self) -> Float[Tensor, "d_model vocab"]:
        """Return `W_U` to be read: with tied embeddings, a view of the embedding."""
        return self.W_U if self._tied_to is None else self._tied_to[0].W_E.T

    def require_linear(self, what: str) -> None:
        """Check that logits are linear in the normalised stream, for something that takes them to be so.

        Args:
            what: takes them to be so; for the message.

        Raises:
            ValueError: a layer with an activation function comes first.
        """
        if self.transform is not None:
            raise ValueError(
                f"{what} takes logits to be linear in the stream, and in this model a layer with the activation "
                f"function {self.cfg.unembed_act_fn!r} stands before W_U (unembed.transform): patch or ablate, or read "
                "the stream with the logit lens instead"
            )

    # Any: parameters, buffers and modules all come through torch's lookup.
    def __getattr__(self, name: str) -> Any:
        # Python calls this only if there is no attribute of that name; torch then looks among parameters and modules.
        if name == "W_U" and vars(self).get("_tied_to") is not None:
            self.untie()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "W_U" and vars(self).get("_tied_to") is not None:
            self.untie()
        if name == "W_U" and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            raise TypeError(f"W_U is a parameter: assign torch.nn.Parameter(...). A functional_call {_UNTIE_FIRST}")
        super().__setattr__(name, value)

    def untie(self, memory_format: torch.memory_format = torch.preserve_format) -> None:
        """Make `W_U` a parameter of its own, if it is the embedding's transpose: a copy of its values.

        Args:
            memory_format: of the copy; by default that of the view, with which logits stay the same to the bit.
        """
        if self._tied_to is None:
            return
        W_E = self._tied_to[0].W_E
        if not isinstance(W_E, nn.Parameter):
            raise TypeError(f"the weights are those of a torch.func.functional_call, which {_UNTIE_FIRST}")
        W_U = W_E.detach().T.clone(memory_format=memory_format)
        # Not by assignment, for which torch looks whether there is such an attribute: that would come back here. And
        # before the tie is cut, so that no other thread finds neither.
        self._parameters["W_U"] = nn.Parameter(W_U, requires_grad=W_E.requires_grad)
        self._tied_to = None
        self.cfg.set_unlocked(tie_word_embeddings=False)

    # torch calls these two for state dicts.

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tied_to is not None:
            destination[f"{prefix}W_U"] = self.matrix() if keep_vars else self.matrix().detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        W_U = state_dict.get(f"{prefix}W_U")
        if self._tied_to is not None and W_U is not None:
            # The embedding has been loaded: it was registered earlier.
            if torch.equal(W_U.to(self.matrix()), self.matrix()):
                state_dict = {name: value for name, value in state_dict.items() if name != f"{prefix}W_U"}
            else:
                self.untie()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_token(self) -> Float[Tensor, "vocab d_model"]:
        """Return `W_U` transposed; the embedding itself if tied."""
        return self.W_U.T if self._tied_to is None else self._tied_to[0].W_E

    def _bias(self) -> Tensor | None:
        """Return `b_U`, or None if it is zero.

        On the CPU, `F.linear` first copies a bias to every row of the output, the model's largest tensor by far.
        Checking `b_U` for zeros costs little, and in most unprocessed models it is zero.
        """
        # Under torch.func a bias of zeros may have a tangent, or be one of a batch.
        needed = (self.b_U.requires_grad and torch.is_grad_enabled()) or transforms_active()
        if needed or torch.compiler.is_compiling() or self.b_U.device.type != "cpu" or bool(self.b_U.any()):
            return self.b_U
        return None


def unembedding_is_live(unembed: nn.Module) -> bool:
    """Return whether hooks act within an unembedding, or modules that may do anything stand in their places.

    Args:
        unembed: the unembedding, or a module in its place.
    """
    inner = (UnembedTransform, Norm, NoNorm)
    return any_live(one for one in unembed.modules() if one is not unembed and not isinstance(one, inner))


def _with_vocabulary(cfg: HookedTransformerConfig | ConfigDict) -> HookedTransformerConfig:
    """Return a component's config, checked: embedding and unembedding need the number of tokens."""
    cfg = HookedTransformerConfig.unwrap(cfg)
    if cfg.d_vocab == -1:
        raise ValueError(
            "d_vocab is missing from the config: the embedding and the unembedding have a row for each token"
        )
    return cfg
