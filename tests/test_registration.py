"""What can be added without editing the package: families of checkpoints, activation functions, metrics."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hooked_lm import CheckpointError, HookedTransformer, HookedTransformerConfig, metrics
from hooked_lm.components import stock
from hooked_lm.config import ACTIVATIONS, activation_names, register_activation
from hooked_lm.config import activations as config_activations
from hooked_lm.metrics import Metric, get_metric, register_metric
from tests.family_rows.row import randomise_reference
from tests.helpers import tiny_config, tiny_model, tiny_tokens
from weight_conversion import register_family, registry
from weight_conversion.families import gpt2
from weight_conversion.family import Family

# Families. The toy is CWM: Llama with a window in some layers.

CWM = """
from weight_conversion import tables
from weight_conversion.families import llama
from weight_conversion.family import Family
from weight_conversion.layer_types import layer_types

def config(fields):
    return {**llama.config(fields), **layer_types(fields)}

def rules(cfg, fields):
    return (
        *tables.embeddings(cfg),
        *tables.norm("layers.{layer}.input_layernorm", "blocks.{layer}.ln1"),
        *tables.attention("layers.{layer}.self_attn"),
        *tables.norm("layers.{layer}.post_attention_layernorm", "blocks.{layer}.ln2"),
        *tables.gated_mlp("layers.{layer}.mlp", bias=fields.take("mlp_bias")),
        *tables.norm("norm", "ln_final"),
    )

FAMILY = Family("CWM", ("CwmForCausalLM",), config, rules)
"""


def cwm_module() -> types.ModuleType:
    module = types.ModuleType("cwm")
    exec(CWM, vars(module))
    return module


@pytest.fixture(autouse=True)
def untouched_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it; entry points have not been looked at. CWM is not there yet."""
    without = {name: family for name, family in registry._BY_ARCHITECTURE.items() if name != "CwmForCausalLM"}
    monkeypatch.setattr(registry, "_BY_ARCHITECTURE", without)
    monkeypatch.setattr(registry, "_loaded_groups", set())
    monkeypatch.setattr(metrics, "_MAKERS", dict(metrics._MAKERS))


@pytest.fixture(scope="module")
def cwm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny CWM of transformers and the folder with its checkpoint."""
    config = transformers.CwmConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=20,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = randomise_reference(transformers.CwmForCausalLM._from_config(config, attn_implementation="eager").eval())
    folder = tmp_path_factory.mktemp("cwm")
    model.save_pretrained(folder)
    return model, folder


def assert_equals_the_reference(theirs: Any, ours: HookedTransformer) -> None:
    tokens = tiny_tokens(pos=9, vocab=60)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["family", "module"])
def test_a_registered_family_loads_a_checkpoint_and_equals_the_reference(
    given: str, cwm: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = cwm
    with pytest.raises(CheckpointError, match="'CwmForCausalLM' is not among the supported ones"):
        HookedTransformer.from_pretrained_no_processing(folder)
    module = cwm_module()
    register_family(module.FAMILY if given == "family" else module)
    ours = HookedTransformer.from_pretrained_no_processing(folder)
    assert [ours.cfg.window(layer) for layer in range(3)] == [None, 3, 3]
    assert_equals_the_reference(theirs, ours)
    ours.to_huggingface(tmp_path)
    assert_equals_the_reference(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ours)


def test_a_taken_architecture_is_refused_unless_it_is_to_be_replaced() -> None:
    mine = Family("mine", ("MineForCausalLM", "GPT2LMHeadModel"), gpt2.config, gpt2.rules)
    with pytest.raises(CheckpointError, match=r"'GPT2LMHeadModel' has the family 'GPT-2' already.*replace=True"):
        register_family(mine)
    assert "MineForCausalLM" not in registry._BY_ARCHITECTURE
    register_family(mine, replace=True)
    assert registry.family_of("GPT2LMHeadModel") is registry.family_of("MineForCausalLM") is mine
    register_family(mine)  # the same once more


@pytest.mark.parametrize("thing", [gpt2.config, types.ModuleType("empty"), "gpt2", None])
def test_what_is_no_family_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="a family is a weight_conversion"):
        register_family(thing)


def test_architectures_are_a_tuple() -> None:
    with pytest.raises(TypeError, match="names its architectures in a tuple; got 'MineForCausalLM'"):
        register_family(Family("mine", "MineForCausalLM", gpt2.config, gpt2.rules))  # type: ignore[arg-type]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path in which a package is installed that names families as entry points."""
    (tmp_path / "their_cwm.py").write_text(CWM)
    (tmp_path / "their_broken.py").write_text("raise RuntimeError('broken on import')\n")
    (tmp_path / "their_gpt2.py").write_text(CWM.replace("CwmForCausalLM", "GPT2LMHeadModel"))
    described = tmp_path / "their_package-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield described / "entry_points.txt"
    for name in ("their_cwm", "their_broken", "their_gpt2"):
        sys.modules.pop(name, None)


def test_an_entry_point_brings_a_family(installed: Path, cwm: tuple[Any, Path]) -> None:
    installed.write_text("[hooked_lm.families]\ncwm = their_cwm:FAMILY\n")
    theirs, folder = cwm
    assert_equals_the_reference(theirs, HookedTransformer.from_pretrained_no_processing(folder))


def test_an_entry_point_may_be_the_module_of_a_family(installed: Path) -> None:
    installed.write_text("[hooked_lm.families]\ncwm = their_cwm\n")
    assert registry.family_of("CwmForCausalLM").name == "CWM"


def test_entry_points_are_loaded_once_and_only_for_an_architecture_that_is_not_known(installed: Path) -> None:
    installed.write_text("[hooked_lm.families]\ncwm = their_cwm:FAMILY\n")
    assert registry.family_of("GPT2LMHeadModel") is gpt2.FAMILY
    assert "their_cwm" not in sys.modules
    family = registry.family_of("CwmForCausalLM")
    del sys.modules["their_cwm"]
    with pytest.raises(CheckpointError, match="'Xyz' is not among"):
        registry.family_of("Xyz")
    assert "their_cwm" not in sys.modules
    assert registry.family_of("CwmForCausalLM") is family


def test_a_broken_entry_point_is_a_warning_that_names_it_and_the_others_still_load(installed: Path) -> None:
    points = ("broken = their_broken:FAMILY", "absent = their_absent", "taken = their_gpt2", "cwm = their_cwm")
    installed.write_text("[hooked_lm.families]\n" + "\n".join(points) + "\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert registry.family_of("CwmForCausalLM").name == "CWM"
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 3
    assert (
        "in the group 'hooked_lm.families', this entry point gives no family: 'absent' (their_absent): ModuleNot"
        in said[0]
    )
    assert "'broken' (their_broken:FAMILY)" in said[1]
    assert "RuntimeError: broken on import" in said[1]
    assert "'taken' (their_gpt2)" in said[2]
    assert "'GPT2LMHeadModel' has the family 'GPT-2' already" in said[2]
    assert registry.family_of("GPT2LMHeadModel") is gpt2.FAMILY


# Activation functions


@pytest.fixture
def softsign() -> Iterator[str]:
    """The name of a registered activation function: x / (1 + |x|)."""
    register_activation("softsign", nn.functional.softsign)
    yield "softsign"
    del config_activations.ACTIVATION_FUNCTIONS["softsign"]


@pytest.mark.parametrize("fields", [{}, {"gated_mlp": True}, {"num_experts": 3, "experts_per_token": 2}])
def test_a_model_runs_with_a_registered_activation_function(softsign: str, fields: dict[str, Any]) -> None:
    model = tiny_model(act_fn=softsign, **fields)
    assert stock.not_stock(model) is None
    if "num_experts" in fields:
        assert model(tiny_tokens()).isfinite().all()
        return
    _, cache = model.run_with_cache(tiny_tokens())
    pre, post = cache["pre", 0], cache["post", 0]
    expected = pre / (1 + pre.abs())
    torch.testing.assert_close(post, expected * cache["pre_linear", 0] if "gated_mlp" in fields else expected)


def test_a_config_with_a_registered_activation_function_is_saved_and_loaded_by_its_name(
    softsign: str, tmp_path: Path
) -> None:
    model = tiny_model(act_fn=softsign)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["act_fn"] == "softsign"
    again = HookedTransformer.from_pretrained_no_processing(tmp_path)
    assert again.cfg.act_fn == "softsign"
    assert torch.equal(again(tiny_tokens()), model(tiny_tokens()))
    assert HookedTransformerConfig.from_dict(model.cfg.to_dict()) == model.cfg


def test_an_activation_function_that_is_not_registered_is_refused_with_the_way_to_register_it() -> None:
    with pytest.raises(ValueError, match=r"act_fn='softsign' is none of .*hooked_lm.config.register_activation"):
        tiny_config(act_fn="softsign")


def test_the_names_of_activation_functions_are_those_registered(softsign: str) -> None:
    assert "softsign" not in ACTIVATIONS
    assert set(activation_names()) == {*ACTIVATIONS, "softsign"}


def test_a_name_that_ends_like_solu_ln_brings_no_layer_norm() -> None:
    register_activation("tanh_ln", torch.tanh)
    try:
        assert not tiny_config(act_fn="tanh_ln").is_layer_norm_activation()
        assert tiny_config(act_fn="solu_ln").is_layer_norm_activation()
    finally:
        del config_activations.ACTIVATION_FUNCTIONS["tanh_ln"]


def test_a_taken_name_of_an_activation_function_is_refused_unless_it_is_to_be_replaced(softsign: str) -> None:
    register_activation(softsign, nn.functional.softsign)
    with pytest.raises(ValueError, match=r"'softsign' is registered already: .*replace=True"):
        register_activation(softsign, torch.tanh)
    built = tiny_model(act_fn=softsign)
    register_activation(softsign, torch.tanh, replace=True)
    assert config_activations.ACTIVATION_FUNCTIONS[softsign] is torch.tanh
    assert built.blocks[0].mlp.act_fn is nn.functional.softsign
    for name in ("gelu", "xielu"):
        with pytest.raises(ValueError, match=f"'{name}' comes with the package"):
            register_activation(name, torch.tanh, replace=True)


@pytest.mark.parametrize(
    ("name", "function", "match"),
    [
        ("my act", torch.tanh, "is an identifier; got 'my act'"),
        ("", torch.tanh, "is an identifier; got ''"),
        ("mine", "tanh", "'tanh' cannot be called"),
        ("mine", nn.PReLU(), "mine has parameters, which all layers would share"),
    ],
)
def test_what_is_no_activation_function_is_refused(name: str, function: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        register_activation(name, function)
    assert name not in activation_names()


# Metrics


def test_every_metric_of_the_module_is_known_by_its_name() -> None:
    named = ("logit", "logit_diff", "preferred", "prob", "log_prob", "rank", "accuracy", "kl_to")
    assert metrics.metric_names() == named
    for name in named:
        assert get_metric(name) is getattr(metrics, name)


def margin(answer: int, pos: int = -1) -> Metric:
    def score(read: Tensor) -> Tensor:
        return read[..., answer] - read.mean(-1)

    return Metric("margin", pos, None, score)


def test_a_registered_metric_is_made_by_its_name() -> None:
    register_metric("margin", margin)
    assert get_metric("margin") is margin
    logits = torch.tensor([[[1.0, 2.0, 6.0]]])
    assert get_metric("margin")(2)(logits) == 3.0


def test_a_taken_name_of_a_metric_is_refused_unless_it_is_to_be_replaced() -> None:
    register_metric("margin", margin)
    register_metric("margin", margin)
    with pytest.raises(ValueError, match=r"'margin' is registered already: .*replace=True"):
        register_metric("margin", metrics.logit)
    register_metric("margin", metrics.logit, replace=True)
    assert get_metric("margin") is metrics.logit
    with pytest.raises(ValueError, match="'prob' comes with the package"):
        register_metric("prob", margin, replace=True)


def test_a_metric_that_is_not_known_raises_and_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no metric 'logit_dif' among logit, .*did you mean 'logit_diff'"):
        get_metric("logit_dif")


@pytest.mark.parametrize(("name", "maker"), [("", margin), (3, margin), ("margin", "margin")])
def test_what_is_no_metric_is_refused(name: Any, maker: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="a metric's"):
        register_metric(name, maker)
