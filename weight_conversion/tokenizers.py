"""Finding and reading the tokenizer of a checkpoint."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from hooked_lm._support.reading import read_json_object
from weight_conversion.aliases import hub_id
from weight_conversion.errors import CheckpointError
from weight_conversion.hub import Hub
from weight_conversion.in_transformers import Tokenizer
from weight_conversion.source import first_line

__all__ = [
    "adds_bos",
    "auto_map",
    "has_tokenizer",
    "is_trusted",
    "load_tokenizer",
    "tokenizer_in",
    "with_bos_of_config",
]

_HUB = Hub()

# Where a vocabulary may be. transformers takes the class of the tokenizer from tokenizer_config.json or config.json.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"),
)
# Packages that transformers needs to read some of these files, by the name it gives them in its errors.
_PACKAGES = {
    "sentencepiece": "sentencepiece",
    "protobuf": "google.protobuf",
    "tiktoken": "tiktoken",
    "mistral-common": "mistral_common",
    "ftfy": "ftfy",
    "sacremoses": "sacremoses",
    "fugashi": "fugashi",
    "rjieba": "rjieba",
    "pythainlp": "pythainlp",
}


class _UnreadableTokenizerError(CheckpointError):
    """transformers cannot make the tokenizer, and its files are not damaged: the model can do without."""


def tokenizer_in(folder: Path, trust_remote_code: bool) -> Tokenizer:
    """Return the tokenizer in a checkpoint's folder; None if there is none, or with a warning if it cannot be made.

    Args:
        folder: the checkpoint.
        trust_remote_code: as for `load_tokenizer`.

    Raises:
        CheckpointError: one of its files is damaged, or it needs code that may not run.
    """
    if not has_tokenizer(folder):
        return None
    try:
        return load_tokenizer(folder, trust_remote_code)
    except _UnreadableTokenizerError as error:
        warnings.warn(f"the model will read tokens only: {error}", stacklevel=4)
        return None


def has_tokenizer(place: Path) -> bool:
    """Return whether a folder holds a tokenizer; a GGUF file does.

    Args:
        place: the folder or file.
    """
    return _is_gguf(place) or any((place / name).is_file() for name in _TOKENIZER_FILES)


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == ".gguf"


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False, hub: Hub = _HUB) -> Tokenizer:
    """Return the tokenizer of a folder, a GGUF file, an alias or a hub id.

    Args:
        name_or_path: the folder, file, alias or hub id.
        trust_remote_code: whether code that comes with the tokenizer may run. Nobody is asked in between.
        hub: how it is fetched.

    Raises:
        CheckpointError: the tokenizer cannot be found or read, or it needs code that may not run.
        TypeError: `trust_remote_code` is no bool.
    """
    trust_remote_code = is_trusted(trust_remote_code)
    path, name_or_path = Path(name_or_path), str(name_or_path)
    # From a folder without a tokenizer, transformers makes an empty one instead of raising.
    if path.is_dir() and not has_tokenizer(path):
        raise CheckpointError(f"no tokenizer: the folder {name_or_path} has none of {', '.join(_TOKENIZER_FILES)}")
    _check_files(path)
    # Only reading text needs transformers, whose import takes seconds.
    from transformers import AutoTokenizer

    try:
        # An explicit False: with None, transformers asks on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent if _is_gguf(path) else name_or_path if path.is_dir() else hub_id(name_or_path),
            trust_remote_code=trust_remote_code,
            **({"gguf_file": path.name} if _is_gguf(path) else hub.keywords()),
        )
    except Exception as error:  # transformers raises many kinds for one cause
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(_OWN_CODE.format(name_or_path)) from error
        raise _UnreadableTokenizerError(
            f"no tokenizer {name_or_path!r}: {_cause(error)}. Pass tokenizer=, or the path of a folder that has one"
        ) from error
    # In place of a class of the checkpoint's own, transformers may take a general one, whose tokens can be others.
    own = "AutoTokenizer" in auto_map(getattr(tokenizer, "init_kwargs", {}))
    if own and not trust_remote_code and type(tokenizer).__name__ in _GENERAL_TOKENIZERS:
        raise CheckpointError(_OWN_CODE.format(name_or_path))
    return tokenizer


def _check_files(folder: Path) -> None:
    """Check that the tokenizer's JSON files in a folder hold JSON."""
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if path.is_file():
            try:
                read_json_object(path, CheckpointError)
            except CheckpointError as error:
                raise CheckpointError(
                    f"no tokenizer: {error}. Download it again, or load without it: tokenizer=False"
                ) from error


def _cause(error: Exception) -> str:
    """Why transformers cannot make a tokenizer: the package that is missing, if that is why."""
    missing = [
        package
        for package, module in _PACKAGES.items()
        if re.search(package.replace("-", "[-_]"), str(error), re.IGNORECASE) and not _is_installed(module)
    ]
    if missing:
        return f"it needs {' or '.join(missing)}, which is not installed: pip install {missing[0]}"
    return f"{type(error).__name__}: {first_line(error)}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


_OWN_CODE = (
    "the tokenizer {!r} is code that comes with it (auto_map in its tokenizer_config.json). Such code runs only if you "
    "ask for it: look at it, then pass trust_remote_code=True to from_pretrained, or load the tokenizer yourself and "
    "pass tokenizer=, or go without: tokenizer=False"
)
_GENERAL_TOKENIZERS = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")


def auto_map(content: Mapping[str, object]) -> Mapping[str, object]:
    """Return the classes of its own that a checkpoint names, by what they stand for.

    Args:
        content: of a config.json or tokenizer_config.json. A list in `auto_map` is an old form for tokenizers.
    """
    found = content.get("auto_map") or {}
    return found if isinstance(found, Mapping) else {"AutoTokenizer": found}


def is_trusted(trust_remote_code: object) -> bool:
    """Return whether code may run: only for True itself; None is False.

    Args:
        trust_remote_code: as the caller gave it.

    Raises:
        TypeError: it is neither a bool nor None.
    """
    if trust_remote_code is not None and not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code is True or False, got {trust_remote_code!r}")
    return trust_remote_code is True


def with_bos_of_config(tokenizer: Tokenizer, config: Mapping[str, object]) -> Tokenizer:
    """Return a tokenizer that has the BOS token of a checkpoint's config, where it names none itself.

    Qwen's is such a one. The config's token counts only if the tokenizer knows it as a special token: many files hold a
    number of another model.

    Args:
        tokenizer: it is copied if it has to be changed.
        config: the checkpoint's config.
    """
    token_id = config.get("bos_token_id")
    if getattr(tokenizer, "bos_token", "") is not None or not isinstance(token_id, int):
        return tokenizer
    known = getattr(tokenizer, "added_tokens_decoder", {}).get(token_id)
    if known is None or not known.special:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = str(known)
    return tokenizer


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer puts its BOS token in front of a text by itself.

    Args:
        tokenizer: one with a BOS token.
    """
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
