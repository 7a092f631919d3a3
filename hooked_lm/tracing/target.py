"""Target: what a trace must know of a model before anything runs. It holds no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hooked_lm.config import HookedTransformerConfig
from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import axis_size
from hooked_lm.names import POSITION_AXES, ActivationKey, UnknownHookError, describe_unknown, get_act_name
from hooked_lm.tracing.graph import Entries, RunSpec
from hooked_lm.tracing.types import Kind, TensorType

__all__ = ["Target"]

_INTEGER_SITES = ("hook_tokens", "hook_expert_indices")


@dataclass(frozen=True)
class Target:
    """The sites and sizes of a model.

    Attributes:
        cfg: its config.
        axes: full hook name -> the names of the activation's axes, in the order in which the hooks run.
        weight_shape: parameter name -> its shape; None if there is none.
        read: prompts, as the model takes them -> the tokens of each.
    """

    cfg: HookedTransformerConfig
    axes: Mapping[str, tuple[str, ...]]
    weight_shape: Callable[[str], tuple[int, ...] | None]
    read: Callable[..., list[list[int]]]
    places: Mapping[str, int] = field(init=False)
    # Types of whole activations, by site and the prompts' lengths: a grid asks for the same ones in every cell.
    _types: dict[tuple[str, tuple[int, ...]], TensorType] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {name: index for index, name in enumerate(self.axes)})

    @classmethod
    def of(cls, model: HookedModel) -> Target:
        """Return the target that a model is.

        Args:
            model: a `HookedTransformer`.
        """

        def read(prompts: object, prepend_bos: bool | None, attention_mask: object) -> list[list[int]]:
            options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
            tokens, mask = model.tokens_and_mask(prompts, attention_mask, **options)  # type: ignore[arg-type]
            if mask is None:
                return tokens.tolist()
            return [row[keep.to(row.device).bool()].tolist() for row, keep in zip(tokens, mask, strict=True)]

        axes = {name: point.axes for name, point in model.hook_dict.items() if point.axes}

        def weight_shape(name: str) -> tuple[int, ...] | None:
            found = dict(model.named_parameters()).get(name)
            if found is None:
                return None
            return tuple(found.shape) if model.ranks is None else model.ranks.whole_shape(name, tuple(found.shape))

        return cls(model.cfg, axes, weight_shape, read)

    def site(self, key: ActivationKey) -> str:
        """Return the full hook name of a site.

        Args:
            key: the name, a short name, or the arguments of `get_act_name`; a negative layer counts from the last.

        Raises:
            UnknownHookError: the model has no such site.
        """
        parts = list(key) if isinstance(key, tuple) else [key]
        if len(parts) > 1 and isinstance(parts[1], int) and -self.cfg.n_layers <= parts[1] < 0:
            parts[1] += self.cfg.n_layers
        if parts == ["logits"]:
            return "unembed.hook_out"
        name = get_act_name(*parts)
        if name not in self.axes:
            raise UnknownHookError(describe_unknown(name, list(self.axes)))
        return name

    def type_of(self, site: str, run: RunSpec, step: Entries = None) -> TensorType:
        """Return the type of a whole activation of a run; positions have size 0 where they differ in number.

        Args:
            site: full hook name.
            run: the run.
            step: the steps of a generation; None for all.
        """
        if run.decoding is not None:
            return self._type_of(site, run, step)
        key = (site, run.lengths)
        if key not in self._types:
            self._types[key] = self._type_of(site, run, step)
        return self._types[key]

    def _type_of(self, site: str, run: RunSpec, step: Entries) -> TensorType:
        sizes: list[int | None] = []
        for axis in self.axes[site]:
            if axis in POSITION_AXES:
                spans = set(run.spans(axis, step))
                sizes.append(spans.pop() if len(spans) == 1 else 0)
            elif axis in ("batch", "1"):
                sizes.append(run.n_prompts if axis == "batch" else 1)
            else:
                sizes.append(axis_size(self.cfg, site, axis))
        if None in sizes:
            unknown = self.axes[site][sizes.index(None)]
            raise ValueError(f"{site!r} has the axis {unknown!r}, whose size the config does not tell")
        kind: Kind = "int" if site.endswith(_INTEGER_SITES) else "float"
        return TensorType(self.axes[site], tuple(size or 0 for size in sizes), kind)
