"""Names and keywords that code for the classic library passes to `from_pretrained`, and a model without any name."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from hooked_lm import HookedTransformer
from tests.gpt2_conversion_helpers import assert_same, tokens
from tests.helpers import tiny_gpt2
from tests.loading_helpers import unprocessed
from weight_conversion.aliases import ALIASES, hub_id
from weight_conversion.published_aliases import PUBLISHED_ALIASES

# Aliases


def test_all_published_aliases_of_supported_families_are_known() -> None:
    assert len(PUBLISHED_ALIASES) == 388
    assert all(alias == alias.lower() for alias in ALIASES)
    assert all(hub_id(alias) == full for alias, full in PUBLISHED_ALIASES.items())


@pytest.mark.parametrize(
    ("alias", "full"),
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("Llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf"),
        ("gpt-neo-125M", "EleutherAI/gpt-neo-125m"),
        ("GPT-J-6B", "EleutherAI/gpt-j-6b"),
        ("pythia-350m-deduped-v0", "EleutherAI/pythia-410m-deduped-v0"),
        ("EleutherAI/pythia-19m", "EleutherAI/pythia-70m"),
        ("tiny-stories-1L-21M", "roneneldan/TinyStories-1Layer-21M"),
        ("stanford-gpt2-small-a", "stanford-crfm/alias-gpt2-small-x21"),
        ("gelu-1l", "NeelNanda/GELU_1L512W_C4_Code"),
        ("GOOGLE/gemma-2-2b", "google/gemma-2-2b"),
        ("someone/Their-Model", "someone/Their-Model"),
    ],
)
def test_an_alias_is_found_in_upper_and_lower_case(alias: str, full: str) -> None:
    assert hub_id(alias) == full


# Keywords


def test_both_names_of_an_argument_are_taken(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(model_name=gpt2_folder, torch_dtype=torch.float64)
    assert model.cfg.dtype is torch.float64
    assert HookedTransformer.from_pretrained(gpt2_folder, model_name=gpt2_folder).cfg.n_layers == 3
    for arguments in ({"model_name": "other"}, {"dtype": "float32", "torch_dtype": "float64"}):
        with pytest.raises(TypeError, match="two names of one thing"):
            HookedTransformer.from_pretrained(gpt2_folder, **arguments)  # type: ignore[arg-type]


def test_what_a_download_is_told_reaches_the_hub_s_client(gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        told.append({"name": name, **options})
        return str(gpt2_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    HookedTransformer.from_pretrained("GPT2-small", cache_dir="/some/cache", token="secret", local_files_only=True)
    assert told[0]["name"] == "openai-community/gpt2"
    assert {name: told[0][name] for name in ("cache_dir", "token", "local_files_only")} == {
        "cache_dir": "/some/cache",
        "token": "secret",
        "local_files_only": True,
    }


def test_what_cannot_act_says_so_once_and_only_if_it_asks_for_something(gpt2_folder: Path) -> None:
    HookedTransformer.from_pretrained(gpt2_folder, n_devices=1, load_in_4bit=False, device_map=None)
    with pytest.warns(UserWarning, match=r"no effect here: n_devices \(.*\); load_in_4bit \(") as caught:
        HookedTransformer.from_pretrained(gpt2_folder, n_devices=2, load_in_4bit=True)
    assert len(caught) == 1


def test_a_keyword_that_nothing_knows_raises_with_the_nearest(gpt2_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"'fold_layernorm': did you mean 'fold_ln'\?|'fold_layernorm'"):
        HookedTransformer.from_pretrained(gpt2_folder, fold_layernorm=True)
    with pytest.raises(TypeError, match=r"'default_prepend_boss': did you mean 'default_prepend_bos'\?"):
        HookedTransformer.from_pretrained(gpt2_folder, default_prepend_boss=True)


def test_without_moving_to_the_device_the_parameters_stay_on_the_cpu(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(gpt2_folder, device="meta", move_to_device=False)
    assert model.embed.W_E.device == torch.device("cpu")
    assert model.cfg.device == "cpu"


# A model in memory


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the network was asked, on a machine that has one but gets no answer."""
    questions: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        questions.append(str(args))
        raise OSError("no answer")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return questions


def test_a_model_in_memory_is_enough_by_itself(gpt2_folder: Path, asked: list[str]) -> None:
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    ours = unprocessed(hf_model=theirs)
    assert_same(ours(tokens()), theirs(tokens()).logits, 1e-4)
    # The folder that it was loaded from has the tokenizer.
    assert ours.to_tokens("a store").shape[0] == 1
    assert ours.cfg.model_name == gpt2_folder.name
    assert asked == []


@pytest.mark.parametrize("name", ["", "someone/their-gpt2"])
def test_without_a_tokenizer_on_this_machine_the_network_is_not_asked(name: str, asked: list[str]) -> None:
    theirs: Any = tiny_gpt2()
    theirs.config._name_or_path = name
    with pytest.warns(UserWarning, match="tokens only"):
        assert unprocessed(hf_model=theirs).tokenizer is None
    assert asked == []
    with pytest.raises(OSError, match="no answer"):
        socket.create_connection(("huggingface.co", 443))
    assert asked


def test_neither_a_name_nor_a_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="name or path of a model, or a model of transformers"):
        HookedTransformer.from_pretrained()
