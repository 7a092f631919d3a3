"""Read JSON and safetensors files that may be damaged, cut off or made by others: each fault is one clear error."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_lm._support.plain_data import PlainData

__all__ = ["MissingFileError", "SafetensorFile", "parse_json", "read_json", "read_json_object", "read_text", "readable"]

# Levels of lists and objects in a JSON text. Real files have fewer than ten; a thousand end Python's recursion.
_DEEPEST = 100
# Digits of an integer. Beyond a few thousand Python refuses them, and torch takes 19.
_LONGEST_INTEGER = 100


class MissingFileError(ValueError, FileNotFoundError):
    """There is no such file."""


@contextmanager
def readable(path: str | Path, error: type[ValueError] = ValueError) -> Generator[None, None, None]:
    """Within a `with` block that reads a file, an OSError is an error that names the file.

    Args:
        path: of the file.
        error: the class of the error. Where it is ValueError, a file that is not there is a FileNotFoundError as well.
    """
    try:
        yield
    except OSError as fault:
        missing = isinstance(fault, FileNotFoundError) and error is ValueError
        raise (MissingFileError if missing else error)(f"{path} cannot be read: {fault.strerror or fault}") from fault


def read_text(path: str | Path, error: type[ValueError] = ValueError) -> str:
    """Return the text of a file in UTF-8.

    Args:
        path: of the file.
        error: the class of the error.

    Raises:
        ValueError: there is no such file, or it holds no text.
    """
    with readable(path, error):
        content = Path(path).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not text in UTF-8: {fault}") from fault


def parse_json(text: str, what: str, error: type[ValueError] = ValueError, *, finite: bool = False) -> object:
    """Return the content of a JSON text.

    Args:
        text: the JSON.
        what: the file, for messages.
        error: the class of the error.
        finite: refuse `NaN` and `Infinity`, which are not JSON, though Python's parser takes them.

    Raises:
        ValueError: it is not JSON, is nested too deeply, holds an integer of thousands of digits, or an object in it
            has one key twice with different values.
    """

    def number(word: str) -> float:
        if finite:
            raise ValueError(f"{word} is no number of JSON")
        return float(word)

    def integer(digits: str) -> int:
        if len(digits) > _LONGEST_INTEGER:
            raise ValueError(f"an integer of {len(digits)} digits, {digits[:20]}...")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is too large for a float")
        return value

    try:
        content: object = json.loads(
            text, object_pairs_hook=_object, parse_constant=number, parse_int=integer, parse_float=real
        )
    except RecursionError as fault:
        raise error(f"{what} is not JSON that can be read: it is nested too deeply") from fault
    except ValueError as fault:
        raise error(f"{what} is not JSON: {fault}") from fault
    if _deeper_than(content, _DEEPEST):
        raise error(f"{what} is not JSON that can be read: it is nested more than {_DEEPEST} levels deep")
    return content


def read_json(path: str | Path, error: type[ValueError] = ValueError, *, finite: bool = False) -> object:
    """Return the content of a JSON file.

    Args:
        path: of the file.
        error: the class of the error.
        finite: as for `parse_json`.

    Raises:
        ValueError: there is no such file, or it holds no JSON.
    """
    try:
        text = read_text(path, ValueError)
    except ValueError as fault:
        if isinstance(fault.__cause__, UnicodeDecodeError):
            raise error(f"{path} is not JSON: {fault.__cause__}") from fault
        raise error(str(fault)) from fault
    return parse_json(text, str(path), error, finite=finite)


def read_json_object(path: str | Path, error: type[ValueError] = ValueError, *, finite: bool = False) -> PlainData:
    """Return the content of a JSON file that holds an object.

    Args:
        path: of the file.
        error: the class of the error.
        finite: as for `parse_json`.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    content = read_json(path, error, finite=finite)
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _object(pairs: Sequence[tuple[str, object]]) -> PlainData:
    """Return a JSON object; a key that comes twice with different values would be read by one parser as another."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = [key for key, value in pairs if not _same(value, content[key])]
        if twice:
            raise ValueError(f"an object has the key {twice[0]!r} twice, with different values")
    return content


def _same(one: object, other: object) -> bool:
    # repr, because 1 == True and nan != nan.
    return one is other or repr(one) == repr(other)


def _deeper_than(content: object, most: int) -> bool:
    level = [content]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


class SafetensorFile:
    """A safetensors file, memory-mapped: a tensor costs nothing until its values are used.

    A file that is made shorter while it is mapped ends the process with SIGBUS when a lost page is used, and one that
    is written to in place changes the tensors. `check` notices both before a tensor is given out. What happens to the
    file after that cannot be noticed.

    Args:
        path: of the file.
        error: the class of the errors.

    Attributes:
        path: of the file.
        metadata: the strings in its header.
        names: of its tensors.
        state: equal for two openings of one file that has not been written to between them.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """

    def __init__(self, path: str | Path, error: type[ValueError] = ValueError) -> None:
        self.path, self._error = Path(path), error
        with readable(path, error):
            if self.path.exists() and not self.path.is_file():
                raise error(f"{path} is not a safetensors file: it is a folder, or no plain file")
            # The open file, and not its path: another file may take its name, and leaves this one whole.
            descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._descriptor, self.state = descriptor, _state(descriptor)
        try:
            # Any: the methods of `safe_open` have no types.
            file: Any = safe_open(self.path, framework="pt")
        # A header can make the parser fail in many ways.
        except (SafetensorError, OSError, ValueError, RecursionError, OverflowError) as fault:
            raise error(f"{path} is damaged or not a safetensors file: {fault}") from fault
        self._file = file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names: tuple[str, ...] = tuple(file.keys())

    def check(self) -> None:
        """Check that nothing has been written to the file since it was opened, and that it is as long as then.

        Raises:
            ValueError: it has changed.
        """
        now = _state(self._descriptor)
        if now != self.state:
            raise self._error(
                f"{self.path} was changed while in use: it had {self.state[0]} bytes when it was opened, and has "
                f"{now[0]}. Its tensors cannot be trusted: read the file again, and replace such a file by renaming "
                "another one rather than write to it in place"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, as the header has it."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as the format names it: `F32`, `BF16`, `I64`."""
        dtype: str = self._file.get_slice(name).get_dtype()
        return dtype

    def tensor(self, name: str) -> Tensor:
        """Return a tensor: a private view of the mapped file.

        Raises:
            ValueError: the file has changed, or torch has no such tensors.
        """
        self.check()
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as fault:
            raise self._error(f"{name} in {self.path} cannot be read: {fault}") from fault
        return tensor


def _state(descriptor: int) -> tuple[int, int]:
    """The bytes of an open file, and when it was last written to."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
