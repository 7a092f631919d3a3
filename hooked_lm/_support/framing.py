"""Messages and files of data: `u64 length of the JSON, little-endian | canonical JSON | safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import parse_json

__all__ = ["LONGEST_JSON", "framed", "unframed"]

LONGEST_JSON = 2**24  # bytes


def framed(document: PlainData, tensors: Mapping[str, Tensor]) -> bytes:
    """Return data as bytes: the same bytes for the same data, whatever the order of keys.

    Args:
        document: plain data, with finite numbers only.
        tensors: name -> tensor, contiguous and in ordinary memory.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return len(text).to_bytes(8, "little") + text + save(dict(sorted(tensors.items())))


def unframed(content: bytes, what: str, error: type[ValueError] = ValueError) -> tuple[object, dict[str, Tensor]]:
    """Return the JSON's content and the tensors of such bytes.

    Args:
        content: the bytes, from anywhere.
        what: they are, for messages: `"trace"`.
        error: the class of the error.

    Raises:
        ValueError: they are cut off, the JSON is none, or the tensors are not safetensors.
    """
    if len(content) < 8:
        raise error(f"a {what} begins with the length of its JSON, 8 bytes; there are {len(content)}")
    length = int.from_bytes(content[:8], "little")
    if length > min(LONGEST_JSON, len(content) - 8):
        raise error(f"a {what} of {len(content)} bytes says that {length} of them are JSON")
    try:
        text = content[8 : 8 + length].decode()
    except UnicodeDecodeError as fault:
        raise error(f"the {what} is not text in UTF-8: {fault}") from fault
    document = parse_json(text, f"the {what}", error, finite=True)
    try:
        return document, load(content[8 + length :])
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError, TypeError) as fault:
        raise error(f"the {what}'s tensors: {fault}") from fault
