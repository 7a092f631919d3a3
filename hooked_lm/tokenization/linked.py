"""A model's own tokenizer: its padding side and its BOS are settings of the model's config, read and written there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tokenization.functions import Tokenizer

__all__ = ["TextDefaults", "linked", "unlinked"]

# A class of tokenizers; the type checker knows neither it nor its instances.
TokenizerClass = Tokenizer


@dataclass
class TextDefaults:
    """The settings of text that a tokenizer without a model follows, under the names of a config's fields.

    Attributes:
        default_prepend_bos: put BOS in front of a text.
        default_padding_side: `"left"` or `"right"`.
    """

    default_prepend_bos: bool
    default_padding_side: str


@dataclass
class _Link:
    """What a linked tokenizer knows of its model.

    Attributes:
        cfg: the model's config, or the settings in its place.
        plain: the tokenizer's class before it was linked.
        own_post_processor: what came with the tokenizer, once it has been read.
        state: whether BOS is put in front, and which, as of the last text; None before the first.
    """

    cfg: HookedTransformerConfig | TextDefaults
    plain: TokenizerClass
    own_post_processor: object = None
    state: tuple[bool, str | None] | None = None


def linked(tokenizer: Tokenizer, cfg: HookedTransformerConfig | TextDefaults) -> Tokenizer:
    """Make a tokenizer follow a config, and the config follow the tokenizer; return the tokenizer.

    `tokenizer.padding_side` is `cfg.default_padding_side` from now on, under two names, and what the tokenizer puts in
    front of a text follows `cfg.default_prepend_bos`: BOS, unless the text begins with BOS, or nothing.

    Args:
        tokenizer: the model's own copy. One of other classes than those of transformers, whose class cannot be
            changed, only gets the padding side that the config has now.
        cfg: the model's config, or the settings in its place.
    """
    tokenizer.padding_side = cfg.default_padding_side
    plain: TokenizerClass = type(tokenizer)
    try:
        tokenizer.__class__ = _linked_class(plain)
    except TypeError:  # a class with slots, or not written in Python
        return tokenizer
    tokenizer.model_link = _Link(cfg, plain)
    return tokenizer


def unlinked(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer as it is without a model: a copy if it is linked to one, or else itself.

    Args:
        tokenizer: any.
    """
    if not isinstance(getattr(tokenizer, "model_link", None), _Link):
        return tokenizer
    side = tokenizer.padding_side
    plain = copy.deepcopy(tokenizer)
    link = plain.__dict__.pop("model_link")
    plain.__class__ = link.plain
    if link.state is not None:
        plain.backend_tokenizer.post_processor = link.own_post_processor
    plain.padding_side = side
    return plain


def follows_bos(tokenizer: Tokenizer) -> bool:
    """Return whether what a tokenizer puts in front of a text follows its model's config.

    Args:
        tokenizer: any.
    """
    makes_inputs = hasattr(tokenizer, "backend_tokenizer") or hasattr(tokenizer, "build_inputs_with_special_tokens")
    return makes_inputs and isinstance(getattr(tokenizer, "model_link", None), _Link)


def _padding_side(self: Tokenizer) -> str:
    return str(self.model_link.cfg.default_padding_side)


def _set_padding_side(self: Tokenizer, side: str) -> None:
    self.model_link.cfg.default_padding_side = side


@functools.cache
def _linked_class(plain: TokenizerClass) -> TokenizerClass:
    """A subclass of a tokenizer's class, of the same name: transformers writes the name into saved files."""
    members: dict[str, object] = {
        "padding_side": property(_padding_side, _set_padding_side),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__reduce_ex__": _reduced,
    }
    if hasattr(plain, "save_pretrained"):
        members["save_pretrained"] = _save_plain
    if hasattr(plain, "backend_tokenizer"):
        members |= {name: _with_bos(name, plain) for name in ("__call__", "encode")}
    elif hasattr(plain, "build_inputs_with_special_tokens"):
        members["build_inputs_with_special_tokens"] = _with_special_tokens
    return type(plain.__name__, (plain,), members)


def _with_bos(name: str, plain: TokenizerClass) -> Callable[..., object]:
    """A method that encodes text, with BOS in front where the model puts it."""
    encoding: Callable[..., object] = getattr(plain, name)

    @functools.wraps(encoding)
    def encode(self: Tokenizer, *args: object, **kwargs: object) -> object:
        _follow(self)
        text = args[0] if args else kwargs.pop("text", None)
        if _begins_with_bos(text, self.bos_token):
            kwargs["add_special_tokens"] = False
        elif isinstance(text, (list, tuple)) and _prepends_now(self) and kwargs.get("add_special_tokens", True):
            # Some begin with BOS: without it, they get it as the others do.
            text = [one.removeprefix(self.bos_token) if isinstance(one, str) else one for one in text]
        return encoding(self, text, *args[1:], **kwargs)

    return encode


def _begins_with_bos(text: object, bos: str | None) -> bool:
    """Whether a text, or each of several, has its BOS already."""
    texts = text if isinstance(text, (list, tuple)) else [text]
    return bool(bos) and bool(texts) and all(isinstance(one, str) and one.startswith(str(bos)) for one in texts)


def _prepends_now(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.model_link.cfg.default_prepend_bos) and tokenizer.bos_token is not None


def _follow(tokenizer: Tokenizer) -> None:
    """Make the tokenizer's own post-processing add what the model adds, if the config has changed since last time."""
    link, backend = tokenizer.model_link, tokenizer.backend_tokenizer
    state = _prepends_now(tokenizer), tokenizer.bos_token
    if link.state == state:
        return
    if link.state is None:
        link.own_post_processor = backend.post_processor
    link.state = state
    # What comes with the tokenizer stays in place where it does the same: it knows offsets and pairs of texts.
    backend.post_processor = link.own_post_processor
    bos = [tokenizer.bos_token_id] if state[0] else []
    if list(backend.encode("a").ids) != bos + list(backend.encode("a", add_special_tokens=False).ids):
        backend.post_processor = _post_processor(tokenizer, state[0])


def _post_processor(tokenizer: Tokenizer, prepend: bool) -> object:
    """A post-processor of the `tokenizers` package that adds BOS, or nothing."""
    # Comes with transformers, which has been imported to make the tokenizer.
    from tokenizers import processors

    bos = tokenizer.bos_token
    template = processors.TemplateProcessing(
        single=[f"{bos}:0", "$A:0"] if prepend else ["$A:0"],
        pair=[f"{bos}:0", "$A:0", "$B:1"] if prepend else ["$A:0", "$B:1"],
        special_tokens=[(bos, tokenizer.bos_token_id)] if prepend else [],
    )
    own = tokenizer.model_link.own_post_processor
    # A byte-level one adds nothing, and trims offsets.
    return processors.Sequence([own, template]) if isinstance(own, processors.ByteLevel) else template


def _with_special_tokens(self: Tokenizer, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
    """As the method of transformers that it replaces in tokenizers written in Python."""
    bos = [self.bos_token_id] if _prepends_now(self) and token_ids_0[:1] != [self.bos_token_id] else []
    return bos + list(token_ids_0) + list(token_ids_1 or [])


def _save_plain(self: Tokenizer, *args: object, **kwargs: object) -> object:
    """Save the tokenizer as it is without a model."""
    written: object = unlinked(self).save_pretrained(*args, **kwargs)
    return written


def _reduced(self: Tokenizer, protocol: int) -> tuple[object, ...]:
    """For copies and pickles, which cannot find a class that is made at run time."""
    plain: TokenizerClass = self.model_link.plain
    _, _, *rest = plain.__reduce_ex__(self, protocol)
    return (_blank, (plain,), *rest)


def _blank(plain: TokenizerClass) -> Tokenizer:
    made = _linked_class(plain)
    return made.__new__(made)
