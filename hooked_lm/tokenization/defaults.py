"""A model's defaults of tokenization, and other values for them for a while."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Protocol

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.tokenization.functions import check_padding_side

__all__ = ["USE_DEFAULT_VALUE", "LocallyOverridenDefaults"]

# The value of `prepend_bos=` and `padding_side=` that stands for the model's default.
USE_DEFAULT_VALUE = None


class _Configured(Protocol):
    """A model with a config."""

    cfg: HookedTransformerConfig


class LocallyOverridenDefaults(ContextDecorator):
    """Within a `with` block, a model's defaults are others; afterwards they are what they were before.

    Args:
        model: a `HookedTransformer`. Its tokenizer's padding side and BOS follow.
        prepend_bos: True or False for `cfg.default_prepend_bos`; None leaves it.
        padding_side: `"left"` or `"right"` for `cfg.default_padding_side`; None leaves it.

    Raises:
        ValueError: another value.
    """

    def __init__(
        self,
        model: _Configured,
        *,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
    ) -> None:
        if prepend_bos not in (True, False, None):
            raise ValueError(f"prepend_bos is True, False or None for the default, not {prepend_bos!r}")
        if padding_side is not None:
            check_padding_side(padding_side)
        self.cfg = model.cfg
        self.prepend_bos, self.padding_side = prepend_bos, padding_side
        self._before: list[tuple[bool, str]] = []  # of each `with` block that is open

    def __enter__(self) -> None:
        self._before.append((self.cfg.default_prepend_bos, self.cfg.default_padding_side))
        if self.prepend_bos is not None:
            self.cfg.default_prepend_bos = self.prepend_bos
        if self.padding_side is not None:
            self.cfg.default_padding_side = self.padding_side

    def __exit__(self, *error: object) -> None:
        self.cfg.default_prepend_bos, self.cfg.default_padding_side = self._before.pop()
