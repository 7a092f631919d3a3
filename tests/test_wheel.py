"""The wheel holds both packages and the bundled model, and works outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob("hooked_lm-*.whl"))


def test_the_wheel_holds_both_packages_the_bundled_model_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "hooked_lm/transformer.py" in names
    assert "hooked_lm/py.typed" in names
    assert "weight_conversion/families/gpt2.py" in names
    assert "hooked_lm/bundled/demo-induction-2l/model.safetensors" in names
    assert "hooked_lm/bundled/demo-tasks-4l/model.safetensors" in names
    assert "hooked_lm/bundled/demo-tasks-4l/tokenizer.json" in names
    assert "hooked_lm/plotting/widgets/attention.js" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "scripts"))]


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import hooked_lm, torch\n"
        f"assert hooked_lm.__file__.startswith({str(site)!r}), hooked_lm.__file__\n"
        "model = hooked_lm.HookedTransformer.from_pretrained('demo-induction-2l')\n"
        "logits, cache = model.run_with_cache(torch.ones(1, 5, dtype=torch.long))\n"
        "print(tuple(cache['pattern', 0].shape))\n"
    )
    # -I: neither the working directory nor PYTHONPATH lead back to the checkout.
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("5, 5)")
