"""The wheel holds both packages and the bundled model, and works outside the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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


# The extras are installed here; these are not to be found in the process that tries the wheel.
WITHOUT_EXTRAS = """
import sys
import importlib.util
absent = {"plotly", "pandas", "kaleido", "IPython", "mkdocs", "playwright"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in absent else find_spec(name, *rest)
sys.meta_path.insert(0, Absent())
"""
REMEDIES = """
import importlib
for ask in (
    lambda: importlib.import_module("hooked_lm.plotting"),
    lambda: importlib.import_module("hooked_lm.utils").logits_to_df(logits[0, 0], model.tokenizer),
):
    try:
        ask()
    except ImportError as error:
        print(error)
"""


def test_every_remedy_names_an_extra_that_brings_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        names = {re.split(r"[\[<>=]", entry)[0] for entry in extras[extra]}
        others = {other for entry in extras[extra] for other in re.findall(r"hooked-lm\[(.*)\]", entry)}
        return names.union(*(brought(one) for other in others for one in other.split(",")))

    for extra, package in (("viz", "plotly"), ("png", "kaleido"), ("notebooks", "pandas"), ("notebooks", "plotly")):
        assert package in brought(extra)


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
    code = WITHOUT_EXTRAS + code + REMEDIES
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5, 5)" in done.stdout
    assert "pip install 'hooked-lm[viz]'" in done.stdout
    assert "pip install 'hooked-lm[notebooks]'" in done.stdout
