"""Code that comes with a checkpoint runs only with `trust_remote_code=True`; without it nobody is asked: it raises."""

from __future__ import annotations

import builtins
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from hooked_lm import HookedTransformer, verify
from hooked_lm.cli import app
from tests.helpers import VOCAB, tiny_config, tiny_gpt2, tiny_tokenizer
from weight_conversion.checkpoint import CheckpointError, load, load_tokenizer

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Path({mark!r}).touch()

class OwnConfig(GPT2Config):
    model_type = {model_type!r}

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def questions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was asked on the terminal: everything is answered with yes."""
    asked: list[str] = []

    def yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", tmp_path / "modules")
    return asked


def checkpoint(plain: Path, to: Path, config: bool, tokenizer: bool, known: bool) -> Path:
    """A checkpoint with code of its own for its config, its tokenizer or both, of a known model type or its own."""
    folder = Path(shutil.copytree(plain, to / "checkpoint"))
    model_type = "gpt2" if known else "own"
    (folder / "own_code.py").write_text(CODE.format(mark=str(to / "ran"), model_type=model_type))
    about = json.loads((folder / "config.json").read_text())
    about["model_type"] = model_type
    if config:
        about["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (folder / "config.json").write_text(json.dumps(about))
    if tokenizer:
        path = folder / "tokenizer_config.json"
        own = {"auto_map": {"AutoTokenizer": ["own_code.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return folder


def command(*words: str) -> Callable[[Path], object]:
    def run(folder: Path) -> None:
        done = CliRunner().invoke(app, [words[0], str(folder), *words[1:]], input="y\n" * 9)
        if done.exit_code:
            raise CheckpointError(done.output)

    return run


DOORS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": HookedTransformer.from_pretrained,
    "without processing": HookedTransformer.from_pretrained_no_processing,
    "neither yes nor no": lambda folder: HookedTransformer.from_pretrained(folder, trust_remote_code=None),  # type: ignore[arg-type]
    "said no": lambda folder: HookedTransformer.from_pretrained(folder, trust_remote_code=False),
    "verify": lambda folder: verify(folder, float64=False),
    "load": load,
    "hooked-lm info": command("info"),
    "hooked-lm verify": command("verify", "--no-float64"),
    "hooked-lm lens": command("lens", "Mary"),
}
TOKENIZER_DOORS: dict[str, Callable[[Path], object]] = {
    "load_tokenizer": lambda folder: load_tokenizer(str(folder)),
    "neither yes nor no to load_tokenizer": lambda folder: load_tokenizer(str(folder), None),  # type: ignore[arg-type]
    "tokenizer_name": lambda folder: HookedTransformer(tiny_config(d_vocab=VOCAB, tokenizer_name=str(folder))),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("door", [*DOORS, *TOKENIZER_DOORS])
@pytest.mark.parametrize("config", [True, False])
def test_a_tokenizer_of_its_own_code_raises(
    door: str, config: bool, known: bool, plain: Path, tmp_path: Path, questions: list[str]
) -> None:
    folder = checkpoint(plain, tmp_path, config, tokenizer=True, known=known)
    # What is read first is what the error is about: a config that no code comes with, and that nothing can read.
    unreadable = door in DOORS and not config and not known
    said = r"(is code that comes with it|code\s+of\s+its\s+own)(.|\s)*trust_remote_code=True"
    with pytest.raises(CheckpointError, match="not accepted by transformers" if unreadable else said):
        {**DOORS, **TOKENIZER_DOORS}[door](folder)
    assert not questions
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_config_of_its_own_code_raises(door: str, plain: Path, tmp_path: Path, questions: list[str]) -> None:
    folder = checkpoint(plain, tmp_path, config=True, tokenizer=False, known=False)
    with pytest.raises(CheckpointError, match=r"model_type\s+'own'(.|\s)*trust_remote_code=True"):
        DOORS[door](folder)
    assert not questions
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("door", DOORS)
def test_code_for_a_known_model_type_is_left_alone(
    door: str, plain: Path, tmp_path: Path, questions: list[str]
) -> None:
    DOORS[door](checkpoint(plain, tmp_path, config=True, tokenizer=False, known=True))
    assert not questions
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("config", "tokenizer", "known"), [(1, 0, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1)])
def test_code_runs_if_asked_for(
    config: bool, tokenizer: bool, known: bool, plain: Path, tmp_path: Path, questions: list[str]
) -> None:
    folder = checkpoint(plain, tmp_path, bool(config), bool(tokenizer), bool(known))
    model = HookedTransformer.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert not questions
    assert (type(model.tokenizer).__name__ == "OwnTokenizer") == bool(tokenizer)
    same = HookedTransformer.from_pretrained(plain)
    assert torch.equal(model("Mary"), same("Mary"))


def test_a_model_in_memory_is_loaded_without_such_a_tokenizer(
    plain: Path, tmp_path: Path, questions: list[str]
) -> None:
    folder = checkpoint(plain, tmp_path, config=True, tokenizer=True, known=False)
    with pytest.warns(UserWarning, match=r"read tokens only.*trust_remote_code=True"):
        model = HookedTransformer.from_pretrained(str(folder), hf_model=tiny_gpt2())
    assert model.tokenizer is None
    with warnings.catch_warnings():
        model = HookedTransformer.from_pretrained(str(folder), hf_model=tiny_gpt2(), tokenizer=tiny_tokenizer())
    assert not questions
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("answer", ["True", "no", 1, 0])
def test_trust_is_true_or_false(answer: Any, plain: Path) -> None:
    for call in (HookedTransformer.from_pretrained, load_tokenizer):
        with pytest.raises(TypeError, match="trust_remote_code is True or False, got"):
            call(str(plain), trust_remote_code=answer)


@pytest.mark.parametrize("given", ["gpt2", Path("somewhere"), 3, ["a", "b"]])
def test_the_name_of_a_tokenizer_is_no_tokenizer(given: Any, plain: Path) -> None:
    model = HookedTransformer(tiny_config())
    for call in (
        model.set_tokenizer,
        lambda given: HookedTransformer(tiny_config(), given),
        lambda given: HookedTransformer.from_pretrained(plain, tokenizer=given),
    ):
        with pytest.raises(TypeError, match=r"a tokenizer is an object such as .* got .*load it first"):
            call(given)
    assert model.tokenizer is None
