"""Recorded values in words: short texts for tables, and the leaves of nested values by their path."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["brief", "flattened", "seconds_in_words"]

_SHORT = 48
# Kinds of packed values whose own text says what they are.
_TOLD = ("text", "torch", "path", "function", "figure", "tool", "float", "complex", "range", "bytes", "array_of")


def flattened(tree: object, path: str = "") -> dict[str, object]:
    """Return the leaves of packed values by their path: numbers and texts as they are, others as the record has them.

    Args:
        tree: packed values.
        path: of the tree.
    """
    return dict(_leaves(tree, path))


def _leaves(tree: object, path: str) -> Iterator[tuple[str, object]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    if "float" in tree:
        yield path, float(tree["float"])
        return
    for kind in ("dict", "fields"):
        if kind in tree:
            for name, one in tree[kind].items():
                yield from _leaves(one, f"{path}.{name}" if path else name)
            return
    for kind in ("list", "tuple", "set"):
        if kind in tree and "array_of" not in tree:
            for index, one in enumerate(tree[kind]):
                yield from _leaves(one, f"{path}[{index}]")
            return
    if "pairs" in tree:
        for key, one in tree["pairs"]:
            yield from _leaves(one, f"{path}[{brief(key)}]")
        return
    yield path, tree


def brief(tree: object, most: int = _SHORT) -> str:
    """Return packed values as a short text.

    Args:
        tree: packed values.
        most: letters.
    """
    text = _text(tree).replace("\n", "↵")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(tree: object) -> str:
    if not isinstance(tree, dict):
        return repr(tree)
    if "tensor" in tree or "array" in tree:
        return f"{'tensor' if 'tensor' in tree else 'array'} {tree['dtype']} {tree['shape']}"
    if "model" in tree:
        found = tree["model"]
        return f"{found['name'] or found['kind']} {found['weights'][:8]}"
    for kind, start, end in (("list", "[", "]"), ("tuple", "(", ")"), ("set", "{", "}")):
        if kind in tree:
            entries = [_text(one) for one in tree[kind][:20]]
            more = [f"… {len(tree[kind])} in all"] if len(tree[kind]) > 20 else []
            return f"{start}{', '.join([*entries, *more])}{end}"
    if "dict" in tree or "fields" in tree:
        inner = ", ".join(f"{key}={_text(one)}" for key, one in (tree.get("dict") or tree.get("fields") or {}).items())
        return f"{tree.get('class', '').rpartition('.')[2] or 'dict'}({inner})"
    if "pairs" in tree:
        return f"dict({', '.join(f'{_text(key)}: {_text(one)}' for key, one in tree['pairs'])})"
    told = next((kind for kind in _TOLD if kind in tree), None)
    return str(tree if told is None else tree[told])


def seconds_in_words(seconds: float) -> str:
    """Return a duration with a unit that suits it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
