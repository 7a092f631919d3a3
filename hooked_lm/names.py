"""The axis glossary and the grammar of hook names.

Four things are decided here and nowhere else: the names of axes in annotations and contractions, along which of them
interventions and grids select, the names of hooks, and which hooks a caller selects with a name, a glob, a list or a
predicate.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

__all__ = [
    "AXES",
    "GRID_AXES",
    "GRID_AXIS_ALIASES",
    "POSITION_AXES",
    "SELECTED_AXES",
    "ActivationKey",
    "GridAxis",
    "NamesFilter",
    "UnknownHookError",
    "describe_unknown",
    "get_act_name",
    "grid_axis",
    "is_pattern",
    "layer_of",
    "select_names",
    "selected_axis",
]

AXES: dict[str, str] = {
    "batch": "prompts",
    "out_batch": "prompts after hooks, which may change how many there are",
    "pos": "positions of the tokens in this call",
    "query": "destination positions of attention",
    "key": "source positions of attention, cached ones included",
    "head": "attention (query) heads",
    "kv_head": "key-value heads; fewer than `head` with grouped queries",
    "d_head": "a head's internal dimension",
    "d_value": "a head's internal dimension of values and z, where it differs (latent attention)",
    "d_latent_kv": "the latent that keys and values are read from",
    "d_latent_q": "the latent that queries are read from",
    "d_model": "the residual stream",
    "d_mlp": "the MLP's hidden layer",
    "vocab": "tokens of the vocabulary",
    "layer": "transformer blocks",
    "expert": "experts of a mixture",
    "component": "stacked pieces of the residual stream",
}

# Field of an `Intervention` -> the names of the axes it may select along. The field `feature` selects along the last
# axis, whatever its name (`d_sae` of a hook point that a user added), unless that name is one of these or in
# `_NO_FEATURES`.
SELECTED_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("batch",),
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
}
_NO_FEATURES = ("1", "chosen")

# Axes with an entry for each position of the prompts.
POSITION_AXES = (*SELECTED_AXES["pos"], "key")


@dataclass(frozen=True)
class GridAxis:
    """An axis of a patching grid, in terms of activations and interventions.

    Attributes:
        along: the axis of an activation, by any of the names that sites give it.
        field: the field of an `Intervention` that selects there.
    """

    along: tuple[str, ...]
    field: Literal["pos", "head", "feature"]


# Axis of a grid, but for `layer` -> where it goes along. Every other name is that of an activation's last axis.
GRID_AXES: dict[str, GridAxis] = {
    "pos": GridAxis(SELECTED_AXES["pos"], "pos"),
    "head": GridAxis(SELECTED_AXES["head"], "head"),
    "dest_pos": GridAxis(("query",), "pos"),
    "src_pos": GridAxis(("key",), "feature"),
    "neuron": GridAxis(("d_mlp",), "feature"),
}
# Other names for axes of a grid, which `generic_activation_patch` takes.
GRID_AXIS_ALIASES = {"head_index": "head"}

NamesFilter = None | str | Iterable[str] | Callable[[str], bool]
# One activation: a hook name, or the arguments of `get_act_name`, `("z", 3)`.
ActivationKey = str | tuple[str | int | None, ...]

# Where a short name lives inside a block.
_BLOCK_SITES = [
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "q_input",
    "k_input",
    "v_input",
    "mlp_in",
    "attn_out",
    "mlp_out",
    "shortcut_out",
]
_ATTN_SITES = [
    *("q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern", "gate", "result"),
    *("latent_kv", "latent_q"),
]
_MLP_SITES = ["pre", "mid", "post", "pre_linear", "expert_weights", "expert_indices"]
_NORM_SITES = ["scale", "normalized"]
_MODEL_SITES = ["tokens", "embed", "pos_embed"]
_NORM_MODULES = ["ln1", "ln2", "ln1_post", "ln2_post"]
_OTHER_NORMS = ["mlp.ln", "attn.q_norm", "attn.k_norm", "attn.latent_kv_norm", "attn.latent_q_norm"]

_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_MODULE_ALIASES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_COMPACT = re.compile(r"(?P<name>[a-z_]+?)(?P<layer>\d+)(?P<module>[a-z]\w*)?")
_IN_BLOCK = re.compile(r"blocks\.(?P<layer>-?\d+)\.(?P<rest>.+)")


class UnknownHookError(KeyError):
    """A hook name, or a pattern over hook names, that matches nothing."""

    def __str__(self) -> str:
        return str(self.args[0])


def selected_axis(axes: Sequence[str], field: str) -> int | None:
    """Return the index of the axis along which a field of an `Intervention` selects, or None if there is no such axis.

    Args:
        axes: the names of an activation's axes.
        field: `"batch"`, `"pos"`, `"head"` or `"feature"`.

    >>> selected_axis(("batch", "head", "query", "key"), "pos")
    2
    """
    if field == "feature":
        others = {name for names in SELECTED_AXES.values() for name in names}
        return len(axes) - 1 if axes and axes[-1] not in (*others, *_NO_FEATURES) else None
    return max((index for index, axis in enumerate(axes) if axis in SELECTED_AXES[field]), default=None)


def grid_axis(name: str) -> GridAxis:
    """Return an axis of a grid by its name; a name that is not in `GRID_AXES` is that of the activation's last axis.

    Args:
        name: of the grid's axis.
    """
    return GRID_AXES.get(name, GridAxis((name,), "feature"))


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Return the full hook name of a short one.

    Args:
        name: a short name (`"q"`, `"resid_pre"`, `"pattern"`, `"scale"`), a compact one (`"k6"`, `"scale4ln1"`), or a
            full hook name, which comes back as it is.
        layer: the block, for names that live in one.
        layer_type: the module inside the block; needed for norms (`"ln1"`, `"ln2"`), optional elsewhere
            (`"attn"` or `"a"`, `"mlp"` or `"m"`). `scale` and `normalized` without a layer mean the final norm.

    Raises:
        ValueError: an unknown name, a missing layer, a layer for a site of the whole model, or a module without the
            site.

    >>> get_act_name("resid_pre", 3)
    'blocks.3.hook_resid_pre'
    >>> get_act_name("scale4ln1")
    'blocks.4.ln1.hook_scale'
    """
    if layer is None and layer_type is None:
        if "." in name or name.startswith("hook_"):
            return name
        compact = _COMPACT.fullmatch(name)
        if compact:
            name, layer, layer_type = compact["name"], int(compact["layer"]), compact["module"]
    site = _ALIASES.get(name, name)
    module = _module_of(site, layer, layer_type)
    if module == "unembed":
        return f"unembed.hook_{site}"
    if site in _MODEL_SITES:
        return f"hook_{site}"
    if layer is None:
        return f"ln_final.hook_{site}"
    return ".".join(part for part in (f"blocks.{layer}", module, f"hook_{site}") if part)


def _module_of(site: str, layer: int | str | None, layer_type: str | None) -> str:
    """The module a short name lives in, checked against the layer and module the caller gave."""
    modules = {
        **dict.fromkeys(_BLOCK_SITES, ""),
        **dict.fromkeys(_ATTN_SITES, "attn"),
        **dict.fromkeys(_MLP_SITES, "mlp"),
        **dict.fromkeys(_MODEL_SITES, ""),
        **dict.fromkeys(("in", "out"), "unembed"),
    }
    given = None if layer_type is None else _MODULE_ALIASES.get(layer_type, layer_type)
    if site in _NORM_SITES:
        if layer is None and given in (None, "ln_final"):
            return "ln_final"
        if layer is None or given not in (*_NORM_MODULES, *_OTHER_NORMS):
            raise ValueError(
                f"{site!r} with layer {layer!r} and module {layer_type!r}: give a layer and one of {_NORM_MODULES}, "
                "or neither for the final norm"
            )
        return given
    if site not in modules:
        raise ValueError(f"unknown activation {site!r}{_did_you_mean(site, [*modules, *_NORM_SITES])}")
    module = modules[site]
    if given is not None and given != module:
        raise ValueError(f"{site!r} lives in {module or 'the block'!r}, not in {layer_type!r}")
    if site in _MODEL_SITES or module == "unembed":
        if layer is not None:
            raise ValueError(f"{site!r} belongs to the whole model: give no layer (got {layer!r})")
    elif layer is None:
        raise ValueError(f"{site!r} lives in a block: give its layer, for example ({site!r}, 0)")
    return module


def layer_of(name: str) -> int | None:
    """Return the block a full hook name belongs to, or None when it belongs to the whole model."""
    match = _IN_BLOCK.match(name)
    return int(match["layer"]) if match else None


def select_names(names_filter: NamesFilter, known: Sequence[str]) -> list[str]:
    """Return the names in `known`, in their order, that a filter picks.

    Args:
        names_filter: None for all; a name or a glob (`"blocks.*.attn.hook_pattern"`); an iterable of those; or a
            predicate on names.
        known: the names there are.

    Raises:
        UnknownHookError: a name, a glob or a predicate matches nothing. One bad entry among good ones raises too.
        TypeError: the filter is none of these.
    """
    if names_filter is None:
        return list(known)
    if callable(names_filter):
        picked = [name for name in known if names_filter(name)]
        if not picked:
            raise UnknownHookError(
                f"the predicate {getattr(names_filter, '__name__', names_filter)!s} matches none of the {len(known)} "
                f"hook names; they look like {', '.join(map(repr, known[:3]))}; hook_names() prints all of them"
            )
        return picked
    if isinstance(names_filter, str):
        return _match_entry(names_filter, known)
    if not isinstance(names_filter, Iterable):
        raise TypeError(f"a names filter is None, a name, a glob, a list of those or a predicate, not {names_filter!r}")
    entries = list(names_filter)
    if not entries:
        raise UnknownHookError("the names filter is empty: it would match no hook; pass None for all of them")
    wanted: set[str] = set()
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"a list of names holds strings, not {entry!r}")
        wanted.update(_match_entry(entry, known))
    return [name for name in known if name in wanted]


def is_pattern(entry: object) -> bool:
    """Whether a filter entry may rightly match several hooks: a glob or a predicate, not one plain name."""
    return not isinstance(entry, str) or any(char in entry for char in "*?[")


def _match_entry(entry: str, known: Sequence[str]) -> list[str]:
    matches = [name for name in known if fnmatchcase(name, entry)] if is_pattern(entry) else []
    if not matches and entry in known:
        matches = [entry]
    if not matches:
        raise UnknownHookError(describe_unknown(entry, known))
    return matches


def describe_unknown(name: str, known: Sequence[str]) -> str:
    """Say why a hook name is not among `known`, and which names come near.

    Args:
        name: a hook name or a glob.
        known: the names that there are.
    """
    if is_pattern(name):
        return f"the pattern {name!r} matches no hook{_did_you_mean(name.replace('*', '0'), known)}"
    match = _IN_BLOCK.fullmatch(name)
    layers = sorted({layer for layer in map(layer_of, known) if layer is not None})
    if match and layers and int(match["layer"]) not in layers:
        return f"no hook {name!r}: layers run {layers[0]}-{layers[-1]}"
    return f"no hook {name!r}{_did_you_mean(name, known)}"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not near:
        # A short name given where a full one is needed: `pattern` for `blocks.0.attn.hook_pattern`.
        near = [full for full in known if full.endswith(f"hook_{name.split('.')[-1]}")][:3]
    if not near:
        return "; hook_names() prints the names this model has"
    return f"; did you mean {' or '.join(map(repr, near))}?"
