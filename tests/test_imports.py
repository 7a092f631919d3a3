"""What importing the package costs, and that its public names resolve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hooked_lm

ROOT = Path(hooked_lm.__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after one statement."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_neither_torch_nor_transformers_nor_plotly() -> None:
    loaded = modules_after("import hooked_lm")
    assert "hooked_lm" in loaded
    assert not loaded & {"torch", "transformers", "plotly", "pandas", "huggingface_hub", "safetensors"}


def test_importing_the_model_loads_no_transformers_and_no_plotly() -> None:
    loaded = modules_after("from hooked_lm import HookedTransformer")
    assert "hooked_lm.transformer" in loaded
    assert not loaded & {"transformers", "plotly", "pandas", "tokenizers"}


def test_building_and_running_a_model_loads_no_transformers() -> None:
    loaded = modules_after(
        "import torch\n"
        "from hooked_lm import HookedTransformer, HookedTransformerConfig\n"
        "cfg = HookedTransformerConfig(n_layers=1, d_model=4, n_heads=1, n_ctx=4, d_vocab=5, act_fn='relu')\n"
        "HookedTransformer(cfg).run_with_cache(torch.tensor([[1, 2]]))"
    )
    assert "transformers" not in loaded


def test_every_public_name_resolves() -> None:
    resolved = {name: getattr(hooked_lm, name) for name in hooked_lm.__all__}
    # The classic library's word for "as the model's config says" is None.
    assert [name for name, value in resolved.items() if value is None] == ["USE_DEFAULT_VALUE"]
    assert [name for name, value in resolved.items() if getattr(hooked_lm, name) is not value] == []
    assert set(resolved) <= set(dir(hooked_lm))


def test_the_contracts_names_are_public() -> None:
    expected = {"HookedTransformer", "HookedTransformerConfig", "ActivationCache", "FactoredMatrix", "HookPoint"}
    expected |= {"HookedRootModule", "HookedTransformerKeyValueCache", "SVDInterpreter", "utils", "components"}
    assert expected <= set(hooked_lm.__all__)
    assert len(set(hooked_lm.__all__)) == len(hooked_lm.__all__)


def test_an_unknown_attribute_of_the_package_raises() -> None:
    with pytest.raises(AttributeError, match="module 'hooked_lm' has no attribute 'HookedTransfomer'"):
        _ = hooked_lm.HookedTransfomer  # type: ignore[attr-defined]


def test_the_type_checkers_list_of_names_is_the_public_one() -> None:
    import ast

    tree = ast.parse(Path(hooked_lm.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    names = {alias.asname or alias.name for node in guarded.body for alias in getattr(node, "names", ())}
    assert names == set(hooked_lm.__all__)
