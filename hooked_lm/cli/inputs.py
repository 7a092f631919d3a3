"""Inputs of commands: a model, prompts, answers. An error in them ends the program with one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from hooked_lm.transformer import HookedTransformer

__all__ = [
    "TEXT_RULE",
    "Device",
    "IgnoredFields",
    "ModelName",
    "Revision",
    "check_device",
    "load_model",
    "one_line_errors",
    "read_answer",
    "read_prompt",
    "spell",
    "token_data",
]

ModelName = Annotated[str, typer.Argument(help="A bundled model, a folder, an alias such as gpt2-small, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
IgnoredFields = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config-fields",
        metavar="FIELD",
        help="A field of the checkpoint's config to read as if it were not there; may be repeated.",
    ),
]

# How prompts and answers are read, for the help texts.
TEXT_RULE = (
    "With a tokenizer, prompts and answers are text, and a start token comes in front of a prompt where the model "
    'prepends one by default. Without a tokenizer they are token numbers ("0 5 9 12"), and no token comes in front.'
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on standard error and exit code 2 where the input cannot be used."""
    from hooked_lm.names import UnknownHookError

    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, UnknownHookError, OSError) as error:
        typer.echo(" ".join(str(error).split()), err=True)
        raise typer.Exit(2) from error


def load_model(
    name: str, revision: str | None, device: str = "cpu", ignored: Sequence[str] | None = None
) -> HookedTransformer:
    """Return a model, processed as `from_pretrained` does.

    Raises:
        ValueError: the model cannot be loaded, or there is no such device.
    """
    from hooked_lm.transformer import HookedTransformer

    check_device(device)
    return HookedTransformer.from_pretrained(name, revision=revision, device=device, ignore_config_fields=ignored or ())


def check_device(device: str) -> None:
    """Raise a ValueError unless PyTorch can compute there."""
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: there are cpu, cuda, cuda:1 and the like, and mps") from error
    n_devices = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= n_devices.get(chosen.type, 0):
        raise ValueError(f"--device {device!r}: PyTorch finds no such device on this machine")


def read_prompt(model: HookedTransformer, prompt: str, name: str) -> Tensor:
    """Return a prompt's tokens [1 pos]: of its text, or, for a model without a tokenizer, the numbers it names.

    Args:
        model: the model.
        prompt: as given.
        name: of the argument, for the message.

    Raises:
        ValueError: no tokens, tokens outside the vocabulary, or more tokens than the context holds.
    """
    import torch

    if model.tokenizer is not None:
        tokens = model.to_tokens(prompt, truncate=False)
    else:
        words = prompt.replace(",", " ").split()
        if not words or not all(word.isdecimal() for word in words):
            raise ValueError(
                f'{name}: this model has no tokenizer, so a prompt is token numbers such as "0 5 9 12"; got {prompt!r}'
            )
        for word in words:
            _check_number(int(word), model.cfg.d_vocab, name)
        tokens = torch.tensor([[int(word) for word in words]], device=model.embed.W_E.device)
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(f"{name} has {tokens.shape[1]} tokens, and this model reads {model.cfg.n_ctx} at most")
    return tokens


def read_answer(model: HookedTransformer, answer: str, name: str) -> int:
    """Return the one token that an answer is: of its text, or, for a model without a tokenizer, the number it is.

    Raises:
        ValueError: it is not exactly one token, or one that the model does not predict.
    """
    if model.tokenizer is not None:
        try:
            token = model.to_single_token(answer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif answer.strip().isdecimal():
        token = int(answer)
    else:
        raise ValueError(
            f"{name}: this model has no tokenizer, so an answer is one token number such as 12; got {answer!r}"
        )
    _check_number(token, model.cfg.d_vocab_out, name)
    return token


def _check_number(token: int, d_vocab: int, name: str) -> None:
    if token >= d_vocab:
        raise ValueError(f"{name}: token {token} is out of range: this model's tokens are 0-{d_vocab - 1}")


def spell(model: HookedTransformer, token: int) -> str:
    """Return a token as it is shown: its string in quotes, or its number where there is no tokenizer."""
    return str(token) if model.tokenizer is None else repr(model.to_single_str_token(token))


def token_data(model: HookedTransformer, token: int) -> dict[str, int | str | None]:
    """Return a token as data: its number, and its string where there is a tokenizer."""
    return {"token": token, "string": None if model.tokenizer is None else model.to_single_str_token(token)}
