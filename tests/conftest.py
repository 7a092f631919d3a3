"""Fixtures shared by all tests."""

from __future__ import annotations

import os

# Before torch starts its threads. The models here are so small that a second thread only waits for the first, and for
# hundreds of times as long when something else runs beside the tests. Interpreters that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config
from transformers import PreTrainedTokenizerFast

from hooked_lm.tasks import lexicon, word_tokenizer
from tests.helpers import tiny_gpt2, tiny_tokenizer

transformers.utils.logging.disable_progress_bar()
# How long an example takes is a matter of what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# What `make check` runs: seconds of computing from model, hooks, weights and text, and no program but this one.
CORE = (
    *("activation_cache", "architectures", "architectures_of_transformers", "bad_input", "cache_attributions"),
    *("caching", "circuit_scores", "composition", "config", "config_lock", "config_values", "factored_matrix"),
    *("forward", "full_circuits", "head_detector", "heads", "hook_contexts", "hook_points", "hooks", "imports"),
    *("initial_weights", "intervention_values", "interventions", "kl_divergence", "kv_cache", "layers_of_the_package"),
    *("logit_lens", "losses", "metrics", "model_config", "names", "norm_placement", "observing", "own_components"),
    *("padding", "partial_runs", "processing_methods", "products", "rotary_scalings", "rules", "slicing", "sweep"),
    *("sweep_errors", "sweep_work", "threads", "tokens", "utils", "weight_views", "weights"),
)
# Files whose tests take longest come first, so that no process is left with one of them at the end.
LONG = (
    *("compile", "families", "benchmarks", "contestants", "notebooks", "docs", "browser", "hook_sites"),
    *("observing_architectures", "every_own_component", "patching_own_components", "figures_saved", "readme", "cli"),
    *("training", "path_patching", "patching", "lazy_cache", "attribution_patching", "generation", "wheel"),
    *("demo", "tour", "fuzz", "generation_interventions", "classic_reference"),
)
# Files that run the same components many thousands of times. Checking shapes and types there takes three times as long
# as the runs; those components are checked by the tests of architectures, families and sites.
CHECKED_ELSEWHERE = {
    *("attribution_patching", "autocast", "every_own_component", "fuzz", "generation", "generation_interventions"),
    *("lazy_cache", "lazy_cache_changes", "observing", "observing_architectures", "patching", "patching_clean"),
    *("patching_own_components", "path_patching", "random_graphs", "torch_func"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="run the tests that `make check` runs, in seconds")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, with `--core`, the files that are not among those."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    left_out = is_test and config.getoption("core") and subject(collection_path) not in CORE
    return True if left_out else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files whose tests take longest first, and leave the others in their order."""
    items.sort(key=lambda item: LONG.index(subject(item.path)) if subject(item.path) in LONG else len(LONG))


def subject(path: Path) -> str:
    """Return what a file of tests is about: tests/test_names.py -> names."""
    return path.stem.removeprefix("test_")


def pytest_runtest_setup() -> None:
    """A test draws the same random numbers whichever ran before it, and in whichever process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny GPT-2 checkpoint and its tokenizer, as transformers writes them. Do not write to it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 whose tokenizer knows the words of the tasks. Do not write to it."""
    folder, words = tmp_path_factory.mktemp("reader"), word_tokenizer(lexicon())
    tiny_gpt2(vocab_size=len(words), n_positions=128).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that the annotations exclude reach the code, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def checked_where_it_pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types are checked, but for the files whose components are checked elsewhere."""
    if subject(request.path) in CHECKED_ELSEWHERE:
        monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
