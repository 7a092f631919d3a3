"""Which units are read from a site's activation: features, heads, directions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_lm._support.integers import entries_of, integer
from hooked_lm._support.precision import at_least_single
from hooked_lm.hooked_model import HookedModel
from hooked_lm.names import SELECTED_AXES, ActivationKey, UnknownHookError, describe_unknown, get_act_name

__all__ = ["Units"]


@dataclass(frozen=True, eq=False)
class Units:
    """How units are read from a site's activation.

    Attributes:
        site: full hook name.
        with_heads: whether its activations are [batch pos head width]; without heads they are [batch pos width].
        heads, features: which; None for all.
        direction: [direction width], or None.
    """

    site: str
    with_heads: bool
    heads: tuple[int, ...] | None
    features: tuple[int, ...] | None
    direction: Float[Tensor, "direction width"] | None

    @classmethod
    def at(
        cls,
        model: HookedModel,
        site: ActivationKey,
        features: int | Sequence[int] | None,
        heads: int | Sequence[int] | None,
        direction: Tensor | None,
    ) -> Units:
        """Return the units that a caller asked for; the arguments are those of `max_activating`."""
        name = get_act_name(site) if isinstance(site, str) else get_act_name(*site)  # type: ignore[arg-type]
        if name not in model.hook_dict:
            raise UnknownHookError(describe_unknown(name, list(model.hook_dict)))
        axes = tuple(model.hook_dict[name].axes)
        with_heads = len(axes) == 4 and axes[2] in SELECTED_AXES["head"]
        if axes[:2] != ("batch", "pos") or len(axes) != 3 + with_heads:
            raise ValueError(
                f"{name!r} has axes {' '.join(axes)!r}: units are read at sites [batch pos width] or [batch pos head "
                "width]"
            )
        if heads is not None and not with_heads:
            raise ValueError(f"{name!r} has axes {' '.join(axes)!r}: there are no heads to choose")
        if features is not None and direction is not None:
            raise ValueError("features are entries and direction is a projection of the same axis: give one of them")
        if direction is not None and not (direction.is_floating_point() and direction.ndim in (1, 2)):
            raise ValueError(
                f"direction is [width], or several [unit width], of floats; got {direction.dtype} "
                f"{tuple(direction.shape)}"
            )
        return cls(
            name,
            with_heads,
            _several(heads, "heads"),
            _several(features, "features"),
            None if direction is None else torch.atleast_2d(direction),
        )

    def read(self, x: Float[Tensor, "batch pos *head width"]) -> Float[Tensor, "batch pos unit"]:
        """Return the activation of every unit.

        Args:
            x: the site's activation.

        Raises:
            ValueError: it has no such head or feature, or the direction has another width.
        """
        chosen = self._chosen(x)
        x = at_least_single(x) if x.is_floating_point() else x.float()
        if self.heads is not None:
            x = x[:, :, list(chosen["head"])]
        if self.direction is not None:
            x = x @ self.direction.to(x).T
        elif "feature" not in chosen:
            x = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        elif self.features is not None:
            x = x[..., list(chosen["feature"])]
        return x.flatten(2)

    def names(self, x: Float[Tensor, "batch pos *head width"]) -> tuple[str, ...]:
        """Return the name of every unit, in the order of `read`.

        Args:
            x: the site's activation.

        Raises:
            ValueError: as `read`.
        """
        named = [[f"{kind} {entry}" for entry in entries] for kind, entries in self._chosen(x).items()]
        return tuple(" ".join(parts) for parts in itertools.product(*named))

    def _chosen(self, x: Tensor) -> dict[str, Sequence[int]]:
        """The entries along each axis that units differ in, by the axis's name."""
        n_heads, width = x.shape[2], x.shape[-1]
        chosen: dict[str, Sequence[int]] = {}
        if self.with_heads:
            chosen["head"] = self._there(self.heads, n_heads, "head")
        if self.direction is not None:
            if self.direction.shape[1] != width:
                raise ValueError(f"direction has width {self.direction.shape[1]}, and {self.site!r} {width}")
            chosen["direction"] = range(len(self.direction))
        elif self.features is not None or not self.with_heads:
            chosen["feature"] = self._there(self.features, width, "feature")
        return chosen

    def _there(self, chosen: tuple[int, ...] | None, size: int, what: str) -> Sequence[int]:
        wrong = [one for one in chosen or () if not 0 <= one < size]
        if wrong:
            raise ValueError(f"{self.site!r} has {what}s 0-{size - 1}: there is no {what} {wrong[0]}")
        return range(size) if chosen is None else chosen


def _several(chosen: int | Sequence[int] | None, what: str) -> tuple[int, ...] | None:
    if chosen is None:
        return None
    entries = entries_of(chosen)
    several = tuple(integer(one, what) for one in ((chosen,) if entries is None else entries))
    if not several or len(set(several)) < len(several):
        raise ValueError(f"{what} are an integer or several that differ, got {chosen!r}")
    return several
