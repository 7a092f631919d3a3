"""Code written for the classic library finds this one: its import paths, its defaults of loading, its scripts."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hooked_lm
from hooked_lm import HookedTransformer, HookedTransformerConfig, compat, components, hooks
from hooked_lm.compat.table import MISSING, MISSING_MODULES, MODULES
from hooked_lm.config.defaults import CLASSIC, STANDARD, defaults
from tests.helpers import tiny_config, tiny_model, tiny_tokenizer, tiny_tokens

ROOT = Path(hooked_lm.__file__).parents[1]
# The public names that each module of the classic library 3.9.0 defines.
CLASSIC_NAMES: dict[str, str] = json.loads((ROOT / "tests/classic_names.json").read_text())


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install()
    yield
    compat.uninstall()


# Import paths


def looked_up(module: str, name: str) -> str:
    """Return "" where a name of a classic module is found, else what the error says after the colon."""
    try:
        getattr(importlib.import_module(f"hooked_lm.compat.{module}".removesuffix(".")), name)
    except (AttributeError, ModuleNotFoundError) as error:
        return str(error).partition(": ")[2] or str(error)
    return ""


@pytest.mark.parametrize("module", CLASSIC_NAMES)
def test_a_classic_name_is_found_or_the_error_says_what_replaces_it(module: str) -> None:
    hints = {"", *MISSING.values(), *MISSING_MODULES.values()}
    said = {name: looked_up(module, name) for name in CLASSIC_NAMES[module].split()}
    assert {name: text for name, text in said.items() if text not in hints} == {}


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "": "HookedTransformer HookedTransformerConfig ActivationCache FactoredMatrix HookedRootModule SVDInterpreter",
        "HookedTransformer": "HookedTransformer ActivationCache HookedRootModule",
        "hook_points": "HookPoint HookedRootModule LensHandle",
        "components": "Attention GroupedQueryAttention MLP GatedMLP MoE LayerNorm LayerNormPre RMSNorm RMSNormPre",
        "components.mlps.can_be_used_as_mlp": "CanBeUsedAsMLP",
        "cache.key_value_cache": "TransformerLensKeyValueCache",
        "past_key_value_caching": "HookedTransformerKeyValueCache HookedTransformerKeyValueCacheEntry",
        "patching": "generic_activation_patch get_act_patch_resid_pre layer_pos_patch_setter make_df_from_ranges",
        "evals": "IOIDataset ioi_eval induction_loss sanity_check",
        "head_detector": "detect_head HEAD_NAMES get_induction_head_detection_pattern",
        "utils": "get_act_name to_numpy Slice lm_cross_entropy_loss test_prompt gelu_new get_corner composition_scores",
        "utilities.tensors": "to_numpy get_corner is_square transpose",
        "utilities.devices": "get_device",
        "loading_from_pretrained": "OFFICIAL_MODEL_NAMES get_official_model_name MODEL_ALIASES",
    }.items(),
)
def test_what_public_code_imports_is_found(module: str, names: str) -> None:
    there = importlib.import_module(f"hooked_lm.compat.{module}".removesuffix("."))
    for name in names.split():
        assert getattr(there, name) is not None


def test_the_objects_are_this_librarys_own() -> None:
    from hooked_lm.compat.components.mlps.mlp import MLP
    from hooked_lm.compat.hook_points import HookPoint
    from hooked_lm.compat.HookedTransformerConfig import HookedTransformerConfig as config

    from hooked_lm.compat import HookedTransformer as classic

    assert (classic, MLP, config, HookPoint) == (
        HookedTransformer,
        components.MLP,
        HookedTransformerConfig,
        hooks.HookPoint,
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from hooked_lm.compat import HookedEncoder", "HookedEncoder: only decoders are here"),
        ("from hooked_lm.compat.train import HookedTransformerTrainConfig", "TrainConfig: training.TrainingConfig"),
        ("from hooked_lm.compat.model_bridge import TransformerBridge", "model_bridge: HookedTransformer.from_pretr"),
        ("import hooked_lm.compat.benchmarks.utils", "benchmarks: hooked_lm.verify"),
        ("from hooked_lm.compat.pretrained.weight_conversions.gpt2 import x", "weight_conversion converts checkpoints"),
        ("from hooked_lm.compat.utils import get_act_nam", "docs/migrating.md says what replaces"),
    ],
)
def test_an_import_of_what_is_not_here_says_what_replaces_it(statement: str, message: str) -> None:
    with pytest.raises(ImportError, match=message):
        exec(statement)


def test_an_attribute_that_is_not_here_is_absent_and_says_what_replaces_it() -> None:
    assert not hasattr(compat, "HookedEncoder")
    with pytest.raises(AttributeError, match="only decoders are here"):
        _ = importlib.import_module("hooked_lm.compat.HookedTransformer").HookedEncoder


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from hooked_lm.compat.patching import *", names)
    assert names["get_act_patch_resid_pre"] is hooked_lm.patching.get_act_patch_resid_pre
    assert "get_act_patch_resid_pre" in dir(importlib.import_module("hooked_lm.compat.patching"))


@pytest.mark.parametrize("module", MODULES)
def test_every_home_of_classic_names_has_public_names(module: str) -> None:
    assert importlib.import_module(MODULES[module]).__all__


# Installing


def test_install_serves_the_classic_package(installed: None) -> None:
    import transformer_lens
    import transformer_lens.utils as classic_utils
    from transformer_lens import patching
    from transformer_lens.HookedTransformer import HookedTransformer as classic

    assert transformer_lens.HookedTransformer is classic is HookedTransformer
    assert classic_utils.get_act_name is hooked_lm.utils.get_act_name
    assert patching.get_act_patch_resid_pre is hooked_lm.patching.get_act_patch_resid_pre
    with pytest.raises(ImportError, match=r"transformer_lens\.HookedEncoder: only decoders are here"):
        exec("from transformer_lens import HookedEncoder")


@pytest.mark.parametrize("name", ["transformer_lens", "transformer-lens", "Transformer.Lens"])
def test_install_gives_the_version_whose_meanings_are_kept(installed: None, name: str) -> None:
    assert importlib.metadata.version(name) == "3.9.0"
    assert importlib.metadata.version("torch") != "3.9.0"


def test_the_package_that_install_serves_looks_installed(installed: None) -> None:
    assert importlib.util.find_spec("transformer_lens") is not None
    names = [found.metadata["Name"] for found in importlib.metadata.distributions()]
    assert names.count("transformer-lens") == 1


def test_install_twice_is_install_once_and_uninstall_undoes_it() -> None:
    paths = list(sys.meta_path)
    compat.install()
    compat.install()
    assert len(sys.meta_path) == len(paths) + 2
    assert defaults() is CLASSIC
    compat.uninstall()
    compat.uninstall()
    assert (sys.meta_path, defaults()) == (paths, STANDARD)
    assert not [name for name in sys.modules if name.partition(".")[0] == "transformer_lens"]


def test_install_refuses_where_the_real_package_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", ModuleType("transformer_lens"))
    with pytest.raises(
        RuntimeError, match=r"came after the import of <module 'transformer_lens'>: call it in a new process"
    ):
        compat.install()
    assert defaults() is STANDARD


# The defaults


def test_the_classic_defaults_load_in_float32(tmp_path: Path) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert HookedTransformer.from_pretrained(tmp_path).cfg.dtype == torch.bfloat16
    compat.install()
    try:
        assert HookedTransformer.from_pretrained(tmp_path).W_E.dtype == torch.float32
        assert HookedTransformer.from_pretrained(tmp_path, dtype=torch.float64).W_E.dtype == torch.float64
        assert HookedTransformer.from_pretrained(tmp_path, torch_dtype="bfloat16").W_E.dtype == torch.bfloat16
    finally:
        compat.uninstall()
    assert HookedTransformer.from_pretrained(tmp_path).W_E.dtype == torch.bfloat16


def test_the_classic_defaults_use_the_gpu_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: None
) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert CLASSIC.device() is None or torch.cuda.is_available()
    # "meta" stands for the GPU, which need not be there.
    monkeypatch.setattr(type(CLASSIC), "device", lambda self: "meta" if self.use_gpu else None)
    assert HookedTransformer(tiny_config()).W_E.device.type == "meta"
    assert HookedTransformer.from_pretrained(tmp_path).W_E.device.type == "meta"
    assert HookedTransformer.from_pretrained(tmp_path).cfg.device == "meta"
    assert HookedTransformer.from_pretrained(tmp_path, device="cpu").W_E.device.type == "cpu"
    assert HookedTransformer.from_pretrained(tmp_path, move_to_device=False).W_E.device.type == "cpu"
    compat.uninstall()
    assert HookedTransformer(tiny_config()).W_E.device.type == "cpu"
    assert HookedTransformer.from_pretrained(tmp_path).W_E.device.type == "cpu"


def test_the_gpu_is_used_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (CLASSIC.device(), STANDARD.device()) == ("cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (CLASSIC.device(), STANDARD.device()) == (None, None)


def test_a_named_hook_that_never_ran_is_a_warning_with_the_classic_defaults() -> None:
    model, late = tiny_model(), "blocks.1.hook_resid_post"

    def hooked() -> torch.Tensor:
        return model.run_with_hooks(tiny_tokens(), stop_at_layer=1, fwd_hooks=[(late, lambda x, hook: x)])

    with pytest.raises(RuntimeError, match=f"{late}' never ran"):
        hooked()
    compat.install()
    try:
        with pytest.warns(UserWarning, match=f"{late}' never ran"):
            output = hooked()
        with pytest.warns(UserWarning, match=f"{late}' never ran"):
            _, cache = model.run_with_cache(
                tiny_tokens(), stop_at_layer=1, names_filter=["blocks.0.hook_resid_post", late]
            )
    finally:
        compat.uninstall()
    assert torch.equal(output, model(tiny_tokens(), stop_at_layer=1))
    assert set(cache) == {"blocks.0.hook_resid_post"}


# Files and scripts


def test_a_pickled_config_of_the_classic_library_loads(installed: None) -> None:
    # The bytes name the class by its classic path, and hold the fields as a dictionary.
    fields = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "n_ctx": 6, "d_vocab": 9, "act_fn": "relu"}
    stands_for = type(
        "HookedTransformerConfig", (), {"__module__": "transformer_lens.config.hooked_transformer_config"}
    )
    there = importlib.import_module("transformer_lens.config.hooked_transformer_config")
    pickled = stands_for.__new__(stands_for)
    vars(pickled).update(fields, n_devices=1, load_in_4bit=False)
    vars(there)["HookedTransformerConfig"] = stands_for
    data = pickle.dumps(pickled)
    del vars(there)["HookedTransformerConfig"]
    loaded = pickle.loads(data)
    assert loaded == HookedTransformerConfig(**fields)
    assert loaded.attn_scale == 2.0
    assert pickle.loads(pickle.dumps(loaded)) == loaded


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m hooked_lm.compat` with some arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "hooked_lm.compat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


SCRIPT = """
import sys
import neighbour
from transformer_lens import HookedTransformer
class Own(HookedTransformer): pass
if __name__ == "__main__":
    import pickle
    print(HookedTransformer.__module__, sys.argv[1:], neighbour.VALUE, sys.path[0], pickle.loads(pickle.dumps(Own)))
    sys.exit(3)
"""


def test_a_script_runs_as_python_runs_it(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "neighbour.py").write_text("VALUE = 7\n")
    done = run("scripts/script.py", "--option", "-m", "x", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    own = "<class '__main__.Own'>"
    assert done.stdout == f"hooked_lm.transformer ['--option', '-m', 'x'] 7 {folder} {own}\n"


def test_a_module_runs_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("pickle.loads(pickle.dumps(Own))", "sys.argv[0]"))
    (tmp_path / "neighbour.py").write_text("VALUE = 8\n")
    done = run("-m", "script", "a", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"hooked_lm.transformer ['a'] 8 {tmp_path} {tmp_path / 'script.py'}\n"


@pytest.mark.parametrize(("arguments", "code"), [((), 1), (("-m",), 1), (("--help",), 0)])
def test_without_a_script_the_usage_is_shown(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert "usage: python -m hooked_lm.compat SCRIPT [arguments]" in (done.stdout if code == 0 else done.stderr)


# The helpers


def test_soft_caps_are_applied_where_they_are_on() -> None:
    from hooked_lm.compat.utils import apply_softcap, softcap_enabled

    x = torch.tensor([0.5, 8.0], dtype=torch.float64)
    assert torch.allclose(apply_softcap(x, 2.0), 2 * torch.tanh(x / 2))
    for off in (None, 0.0, -1.0):
        assert not softcap_enabled(off)
        assert apply_softcap(x, off) is x


def test_nested_attributes_are_read_and_set() -> None:
    from hooked_lm.compat.utils import get_nested_attr, set_nested_attr

    model = tiny_model()
    assert get_nested_attr(model, "blocks.1.attn.W_Q") is model.blocks[1].attn.W_Q
    point = hooks.HookPoint()
    set_nested_attr(model, "blocks.1.attn.hook_z", point)
    set_nested_attr(model, "label", 3)
    assert model.blocks[1].attn.hook_z is point
    assert model.label == 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="nowhere"):
        get_nested_attr(model, "blocks.1.nowhere.W_Q")


def test_a_state_dict_is_filtered_by_its_prefix() -> None:
    from hooked_lm.compat.utils import filter_dict_by_prefix

    entries = {"a.b": 1, "a.c.d": 2, "ab.c": 3}
    assert filter_dict_by_prefix(entries, "a") == filter_dict_by_prefix(entries, "a.") == {"b": 1, "c.d": 2}


def test_every_mlp_counts_as_one() -> None:
    from hooked_lm.compat.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP

    class Own(CanBeUsedAsMLP):
        pass

    gated = {"gated_mlp": True, "act_fn": "silu"}
    models = (tiny_model(), tiny_model(**gated), tiny_model(num_experts=2, experts_per_token=1, **gated))
    assert all(isinstance(model.blocks[0].mlp, CanBeUsedAsMLP) for model in models)
    assert isinstance(Own(), CanBeUsedAsMLP)
    assert not isinstance(models[0].blocks[0].attn, CanBeUsedAsMLP)
    assert not isinstance(models[0].blocks[0].mlp, Own)


def test_names_of_models_are_read_from_the_aliases() -> None:
    from hooked_lm.compat.loading_from_pretrained import (
        DEFAULT_MODEL_ALIASES,
        MODEL_ALIASES,
        OFFICIAL_MODEL_NAMES,
        get_official_model_name,
        make_model_alias_map,
    )

    assert make_model_alias_map()["gpt2-small"] == get_official_model_name("GPT2-small")
    assert len(DEFAULT_MODEL_ALIASES) == len(OFFICIAL_MODEL_NAMES) == len(MODEL_ALIASES)
    with pytest.raises(ValueError, match="'gpt7' has no alias here"):
        get_official_model_name("gpt7")


@pytest.mark.parametrize("pad_token", ["<pad>", "<bos>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bos_is_removed_wherever_padding_puts_it(side: str, pad_token: str) -> None:
    from hooked_lm.compat.utils import get_input_with_manually_prepended_bos, get_tokens_with_bos_removed

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": pad_token})
    tokenizer.padding_side = side
    bos, pad = tokenizer.convert_tokens_to_ids(["<bos>", pad_token])
    full, short = [bos, 3, 4, 5], [bos, 3]
    padded, cut = ([pad, pad, *short], [pad, pad, 3]) if side == "left" else ([*short, pad, pad], [3, pad, pad])
    removed = get_tokens_with_bos_removed(tokenizer, torch.tensor([full, padded]))
    assert removed.tolist() == [[3, 4, 5], cut]
    assert get_tokens_with_bos_removed(tokenizer, torch.tensor([full]), "right").tolist() == [[3, 4, 5]]
    assert get_input_with_manually_prepended_bos("<bos>", ["a", "b"]) == ["<bos>a", "<bos>b"]
    assert get_input_with_manually_prepended_bos(None, "a") == "a"


def test_devices_and_libraries_are_found() -> None:
    from hooked_lm.compat.utils import get_device, get_device_for_block_index, is_library_available

    assert get_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert get_device_for_block_index(1, tiny_config()) == torch.device("cpu")
    assert get_device_for_block_index(1, tiny_config(), "meta") == torch.device("meta")
    assert is_library_available("torch")
    assert not is_library_available("no_such_library")
