"""Which fields of a config transformers, the reference implementation, defines or reads.

A field that it neither defines nor reads cannot change what it computes. What it reads is found in its source text: a
name that is mentioned anywhere in the code of a family counts as read, so mistakes are on the safe side.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from weight_conversion.fields import FieldValue

__all__ = ["Reference"]

# Modules of transformers that read the configs of all families.
_SHARED = ("cache_utils", "configuration_utils", "integrations.moe", "modeling_layers", "modeling_utils")
# Modules that read those of the families that import them. Where the parameters of rotary positions are read, their
# names are strings.
_MASKS, _ROTARY = "masking_utils", "modeling_rope_utils"
_FOREIGN_PACKAGES = ("torch", "huggingface_hub", "builtins", "abc", "typing", "collections", "dataclasses")


class Reference:
    """The classes that stand behind a config.

    Args:
        config_class: a class of configs of transformers, or one derived from it.
        model_class: the class of the model, if there is one in memory.
    """

    def __init__(self, config_class: type, model_class: type | None = None) -> None:
        self._config_class = config_class
        self._classes = (*config_class.__mro__, *(model_class.__mro__ if model_class is not None else ()))

    @classmethod
    def of_model_type(cls, model_type: object) -> Reference | None:
        """Return the reference of a model type; None for one that transformers does not know."""
        from transformers import CONFIG_MAPPING

        known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
        return cls(CONFIG_MAPPING[str(model_type)]) if known else None

    def matters(self, name: str, value: FieldValue) -> bool:
        """Whether a field may change what the reference computes, where it is left out.

        It may if the reference defines or reads it and its value is not the default.

        Args:
            name: the field.
            value: its value.
        """
        aliases = getattr(self._config_class, "attribute_map", {})
        if not (name in aliases or name in dir(self._config_class) or name in vars(self._defaults)):
            return self.reads(name)
        missing = object()
        return bool(getattr(self._defaults, name, missing) != value)

    def reads(self, name: str) -> bool:
        """Whether the reference may read an entry of a dictionary within a config.

        Args:
            name: the entry.
        """
        return self._names is None or name in self._names

    @functools.cached_property
    def _defaults(self) -> object:
        return self._config_class()

    @functools.cached_property
    def _names(self) -> frozenset[str] | None:
        """The names that the code mentions; None if a part of the code cannot be found, so that any may be read."""
        files: set[Path] = set()
        for module in {cls.__module__ for cls in self._classes}:
            if module.partition(".")[0] in _FOREIGN_PACKAGES:
                continue
            where = getattr(sys.modules.get(module), "__file__", None)
            if where is None:
                return None
            files |= set(_with_siblings(Path(where), module))
        shared = [*_SHARED, *(module for module in (_MASKS, _ROTARY) if any(_imports(file, module) for file in files))]
        return frozenset().union(*map(_mentioned, files), *map(_read_from_configs, shared))


def _with_siblings(file: Path, module: str) -> Iterator[Path]:
    """Yield the files of a module's family: those beside it, and those of other families that they import."""
    if not module.startswith("transformers.models."):
        # The modules that all families share are read in another way; any other module is somebody's own.
        if not module.startswith("transformers."):
            yield file
        return
    siblings = [path for kind in ("configuration", "modeling") for path in file.parent.glob(f"{kind}_*.py")]
    yield from siblings
    for path in siblings:
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module and "." in node.module:
                imported = file.parent.parent / (node.module.replace(".", "/") + ".py")
                if imported.is_file():
                    yield imported


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _mentioned(path: Path) -> frozenset[str]:
    """The names of attributes, arguments and annotated variables in a file, and the strings that could be names."""
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        else:
            names.update(_strings([node]))
    return frozenset(names)


def _imports(path: Path, module: str) -> bool:
    """Whether a file imports from a shared module of transformers."""
    return any(
        isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == module
        for node in ast.walk(_parsed(path))
    )


@functools.cache
def _read_from_configs(module: str) -> frozenset[str]:
    """The names that a shared module reads from configs; of the module of rotary positions, every string too."""
    import transformers

    path = Path(transformers.__file__).parent / (module.replace(".", "/") + ".py")
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Attribute) and _is_config(node.value, module == "configuration_utils"):
            names.add(node.attr)
        elif isinstance(node, ast.Call):
            names.update(_asked_for(node))
    return frozenset(names).union(_strings(ast.walk(_parsed(path))) if module == _ROTARY else ())


def _is_config(node: ast.expr, self_is_config: bool) -> bool:
    """Whether an expression is a config, by its name."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.endswith("config") or (self_is_config and name == "self")


def _asked_for(call: ast.Call) -> Iterator[str]:
    """Yield the names that `getattr(config, name)`, `hasattr` and `kwargs.pop(name)` ask for."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr"):
        yield from _strings(call.args[1:2])
    elif isinstance(function, ast.Attribute) and function.attr in ("get", "pop"):
        yield from _strings(call.args[:1])


def _strings(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
