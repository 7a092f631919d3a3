"""The source of a function, and of what it uses of its own module: what a record keeps so that it can be read later."""

from __future__ import annotations

import functools
import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm.experiments.bench.fingerprint import fingerprint_of, sha256, tensor_sha256

__all__ = ["FunctionSource", "source_of"]

_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True)
class FunctionSource:
    """The source of a function and of what it uses.

    Attributes:
        text: of the function, and of the functions and classes of its own package that it calls, the function first.
        hash: the SHA-256 of the text and of `names`.
        names: what the code reads from around it, global constants and variables of functions around it: plain values
            as text, tensors and models by a hash.
        as_loaded: whether the text is that of the code that runs; False where the file was edited after it was
            imported; None where that cannot be told.
    """

    text: str
    hash: str
    names: PlainData
    as_loaded: bool | None


def source_of(function: Callable[..., object]) -> FunctionSource:
    """Return the source of a function and of what it uses of its own package.

    Args:
        function: a function of Python, or another object that can be called; of the latter its class.
    """
    start = inspect.unwrap(function)
    while isinstance(start, partial):
        start = inspect.unwrap(start.func)
    if not isinstance(start, (FunctionType, type)):
        start = getattr(start, "__func__", type(start))
    parts: dict[int, str] = {}
    names: PlainData = {}
    waiting: list[FunctionType | type] = [start]
    while waiting:
        part = waiting.pop(0)
        if id(part) in parts:
            continue
        parts[id(part)] = _text(part)
        for name, value in _used(part):
            if isinstance(value, (FunctionType, type)) and _belongs(value, start):
                waiting.append(value)
            elif (told := _told(value)) is not None:
                names[f"{part.__qualname__}: {name}"] = told
    text = "\n\n".join(parts.values())
    return FunctionSource(text, sha256([text, names]), names, _as_loaded(start))


def _text(part: FunctionType | type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(part)).rstrip() + "\n"
    except (OSError, TypeError):
        code = [sha256(_shape(one)) for one in _codes(part)]
        return f"# {part.__qualname__}: no source is to be had; SHA-256 of its code {sha256(code)}\n"


def _codes(part: FunctionType | type) -> list[CodeType]:
    if isinstance(part, FunctionType):
        return [part.__code__]
    return [
        inspect.unwrap(one).__code__ for one in vars(part).values() if isinstance(inspect.unwrap(one), FunctionType)
    ]


def _used(part: FunctionType | type) -> Iterator[tuple[str, object]]:
    """The values that code takes by name from around it."""
    functions = (
        [part]
        if isinstance(part, FunctionType)
        else [one for one in vars(part).values() if isinstance(one, FunctionType)]
    )
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                value = function.__globals__[name]
                yield name, inspect.unwrap(value) if isinstance(value, FunctionType) else value
                if isinstance(value, ModuleType):
                    yield from (
                        (one, vars(value)[one]) for one in sorted(_names(function.__code__)) if one in vars(value)
                    )


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner)) if inner else set(code.co_names)


def _belongs(part: FunctionType | type, start: FunctionType | type) -> bool:
    """Whether a function is of the same package as the one that is recorded, and of no installed one.

    Of this package, the version in the record's environment tells.
    """
    module, home = part.__module__ or "", start.__module__ or ""
    if home.partition(".")[0] == "hooked_lm":
        return False
    installed = "site-packages" in str(getattr(sys.modules.get(module), "__file__", ""))
    return module.partition(".")[0] == home.partition(".")[0] and not installed


def _is_plain(value: object, depth: int = 3) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)) and depth and len(value) <= 1000:
        return all(_is_plain(one, depth - 1) for one in value)
    if isinstance(value, dict) and depth and len(value) <= 1000:
        return all(_is_plain(one, depth - 1) for pair in value.items() for one in pair)
    return isinstance(value, _PLAIN)


def _told(value: object) -> str | None:
    """What tells a value around a function from another one: its text, or a hash; None for what is not looked at."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        tellable = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        return (
            f"tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)} {tensor_sha256(value)[:16]}"
            if tellable
            else None
        )
    fingerprint = None if isinstance(value, (ModuleType, type)) else fingerprint_of(value)
    if fingerprint is not None:
        return f"{fingerprint}, {sha256(fingerprint.as_dict())[:16]}"
    return _stable(value) if _is_plain(value) else None


def _stable(value: object) -> str:
    """A repr that does not depend on the order of sets, which is another in each process."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(_stable, value)))})"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_stable, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{_stable(key)}: {_stable(one)}' for key, one in value.items())})"
    return repr(value)


def _as_loaded(part: FunctionType | type) -> bool | None:
    """Whether the file of a function, compiled now, has the code that was loaded."""
    if isinstance(part, type) or any(name.startswith("@") for name in part.__code__.co_varnames):
        return None  # pytest puts variables of such names into the code of tests
    lines = linecache.getlines(part.__code__.co_filename)
    found = _compiled("".join(lines), _future(part.__code__)).get(part.__code__.co_qualname, [])
    return _shape(part.__code__) in found if found else None


@functools.lru_cache(maxsize=16)
def _compiled(text: str, flags: int) -> dict[str, list[list[object]]]:
    """The codes of a file by their qualified names; none where it does not compile."""
    try:
        waiting = [compile(text, "<source>", "exec", dont_inherit=True, flags=flags)]
    except (SyntaxError, ValueError):
        return {}
    found: dict[str, list[list[object]]] = {}
    while waiting:
        code = waiting.pop()
        found.setdefault(code.co_qualname, []).append(_shape(code))
        waiting += [one for one in code.co_consts if isinstance(one, CodeType)]
    return found


def _future(code: CodeType) -> int:
    """The flags of `from __future__ import ...` with which code was compiled."""
    return code.co_flags & 0x1FF0000


def _shape(code: CodeType) -> list[object]:
    """Code as plain data, without the lines and the file that it stands in."""
    constants = [_shape(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]
