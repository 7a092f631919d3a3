"""The lock on a built model's config: fields act when they are assigned, or refuse to be."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_lm import HookedTransformerConfig
from hooked_lm.config.lock import ASSIGNABLE
from tests.config_helpers import ROTARY
from tests.helpers import tiny_config

# The lock on a built model's config

ACTING: dict[str, Any] = {
    "attn_scores_soft_cap": 5.0,
    "output_logits_soft_cap": 7.0,
    "attention_dir": "bidirectional",
    "n_ctx": 5,
    "dtype": torch.float16,
    "device": "meta",
    "default_prepend_bos": False,
    "default_padding_side": "left",
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_attn_in": True,
    "use_hook_mlp_in": True,
    "use_hook_tokens": True,
    "ungroup_grouped_query_attention": True,
    "model_name": "mine",
    "tokenizer_name": "some/name",
    "tokenizer_prepends_bos": True,
    "original_architecture": "SomeForCausalLM",
    "from_checkpoint": True,
    "checkpoint_index": 5,
    "checkpoint_label_type": "step",
    "checkpoint_value": 512,
    "seed": 3,
    "init_mode": "xavier_normal",
    "initializer_range": 0.5,
    "init_weights": False,
}


class Owner:
    """Stands for a model: writes down what its config asks of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def told(self, name: str, value: object) -> None:
        self.calls.append((name, value))


def locked_config(owner: Owner | None = None, **fields: Any) -> HookedTransformerConfig:
    cfg = tiny_config(**fields)
    cfg.lock((owner or Owner()).told)
    return cfg


def test_the_table_of_acting_fields_is_the_configs_own() -> None:
    assert set(ACTING) == set(ASSIGNABLE)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(HookedTransformerConfig)])
def test_a_field_of_a_locked_config_acts_or_refuses_to_be_assigned(name: str) -> None:
    owner = Owner()
    cfg = locked_config(owner)
    if name in ACTING:
        setattr(cfg, name, ACTING[name])
        assert getattr(cfg, name) == ACTING[name]
        assert owner.calls == ([(name, ACTING[name])] if name in {"dtype", "device"} else [])
        return
    before = getattr(cfg, name)
    with pytest.raises(AttributeError, match=f"cfg.{name} = 'other' would change nothing: this config belongs to a"):
        setattr(cfg, name, "other")
    setattr(cfg, name, copy.deepcopy(before))
    assert getattr(cfg, name) is before
    assert owner.calls == []


def test_the_refusal_says_how_to_build_a_model_with_the_field() -> None:
    cfg = locked_config()
    with pytest.raises(AttributeError) as caught:
        cfg.n_heads = 6
    assert str(caught.value) == (
        "cfg.n_heads = 6 would change nothing: this config belongs to a model that is already built. "
        "Build a model anew: HookedTransformer(model.cfg.replace(n_heads=6))"
    )
    assert cfg.replace(n_heads=6).n_heads == 6


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attn_scores_soft_cap", "5", "attn_scores_soft_cap is a finite number; got '5'"),
        ("attn_scores_soft_cap", True, "attn_scores_soft_cap is a finite number; got True"),
        ("output_logits_soft_cap", math.inf, "output_logits_soft_cap is a finite number; got inf"),
        ("output_logits_soft_cap", None, "output_logits_soft_cap is a finite number; got None"),
        ("attention_dir", "casual", "did you mean 'causal'"),
        ("n_ctx", 0, "n_ctx is an integer of at least 1; got 0"),
        ("n_ctx", 5.0, "n_ctx is an integer of at least 1; got 5.0"),
        ("dtype", "float23", "dtype is a floating-point torch dtype or its name; got 'float23'"),
        ("device", None, "device is a torch device or its name; got None"),
        ("default_prepend_bos", "yes", "default_prepend_bos is True or False; got 'yes'"),
        ("default_padding_side", "rigth", "did you mean 'right'"),
        ("use_attn_result", None, "use_attn_result is True or False; got None"),
        ("init_mode", "xavier", "init_mode='xavier' is none of"),
    ],
)
def test_a_bad_value_for_an_acting_field_raises_and_is_not_stored(name: str, value: object, match: str) -> None:
    owner = Owner()
    cfg = locked_config(owner, device="cpu")
    before = getattr(cfg, name)
    with pytest.raises(ValueError, match=match):
        setattr(cfg, name, value)
    assert getattr(cfg, name) == before
    assert owner.calls == []


def test_a_locked_model_with_learned_positions_refuses_a_longer_context_and_one_without_takes_it() -> None:
    learned, rotary = locked_config(n_ctx=8), locked_config(n_ctx=8, **ROTARY)
    learned.n_ctx = 4
    learned.n_ctx = 8
    with pytest.raises(ValueError, match="n_ctx=9 is more than the 8 positions this model has learned"):
        learned.n_ctx = 9
    rotary.n_ctx = 9
    assert (learned.n_ctx, rotary.n_ctx) == (8, 9)


def test_a_locked_config_refuses_a_direction_that_contradicts_its_other_fields() -> None:
    cfg = locked_config(positional_embedding_type="alibi", alibi_in_bfloat16=True)
    with pytest.raises(ValueError, match="alibi_in_bfloat16"):
        cfg.attention_dir = "bidirectional"


def test_dtype_and_device_are_parsed_and_the_owner_is_told_only_of_a_change() -> None:
    owner = Owner()
    cfg = locked_config(owner, device="cpu")
    cfg.dtype = "bfloat16"  # type: ignore[assignment]
    cfg.device = torch.device("meta")  # type: ignore[assignment]
    cfg.dtype, cfg.device = torch.bfloat16, "meta"
    cfg.device = torch.device("meta")  # type: ignore[assignment]
    assert (cfg.dtype, cfg.device) == (torch.bfloat16, "meta")
    assert owner.calls == [("dtype", torch.bfloat16), ("device", "meta")]


def test_a_move_that_fails_leaves_the_config_as_it_was_and_one_that_names_the_place_has_the_last_word() -> None:
    cfg, other = tiny_config(device="cpu"), tiny_config(device="cpu")

    def fails(name: str, value: object) -> None:
        raise RuntimeError("out of memory")

    cfg.lock(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cfg.device = "cuda"
    assert cfg.device == "cpu"
    other.lock(lambda name, value: other.set_unlocked(device=f"{value}:0"))
    other.device = "cuda"
    assert other.device == "cuda:0"


def test_the_model_itself_sets_any_field_of_its_locked_config_and_no_other() -> None:
    owner = Owner()
    cfg = locked_config(owner)
    cfg.set_unlocked(normalization_type="LNPre", tie_word_embeddings=False, dtype=torch.float64, attn_types=["global"])
    assert (cfg.normalization_type, cfg.dtype, cfg.attn_types) == ("LNPre", torch.float64, ["global"])
    assert owner.calls == []
    with pytest.raises(AttributeError, match="no field 'd_modle'"):
        cfg.set_unlocked(n_heads=7, d_modle=3)
    assert cfg.n_heads == 3
    with pytest.raises(TypeError, match="changing this list"):
        cfg.attn_types.append("local")
    with pytest.raises(AttributeError, match=r"cfg.eps = 0.1 would change nothing"):
        cfg.eps = 0.1


def test_a_locked_config_cannot_be_locked_again_unlocked_or_robbed_of_a_field() -> None:
    cfg = locked_config()
    with pytest.raises(RuntimeError, match="belongs to a model already"):
        cfg.lock(Owner().told)
    with pytest.raises(AttributeError, match="cannot be unlocked"):
        cfg._lock = None  # type: ignore[assignment]
    for name in ("n_heads", "n_ctx", "_lock"):
        with pytest.raises(AttributeError, match=f"cfg.{name} cannot be deleted"):
            delattr(cfg, name)
    assert cfg.is_locked


@pytest.mark.parametrize("locked", [False, True])
def test_an_attribute_that_is_no_field_raises_locked_or_not(locked: bool) -> None:
    cfg = locked_config() if locked else tiny_config()
    with pytest.raises(AttributeError, match="no attribute 'n_head'"):
        cfg.n_head = 3  # type: ignore[attr-defined]


COPIES: dict[str, Any] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cfg: pickle.loads(pickle.dumps(cfg)),
    "dataclasses.replace": dataclasses.replace,
    "replace": lambda cfg: cfg.replace(),
    "to_dict": lambda cfg: HookedTransformerConfig.from_dict(cfg.to_dict()),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_locked_config_is_equal_unlocked_and_without_an_owner(way: str) -> None:
    owner = Owner()
    cfg = locked_config(owner, **ROTARY, window_size=3, attn_types=["local", "global"], rotary_layers=[True, False])
    copied = COPIES[way](cfg)
    assert (
        copied
        == cfg
        == tiny_config(**ROTARY, window_size=3, attn_types=["local", "global"], rotary_layers=[True, False])
    )
    assert cfg.is_locked
    assert not copied.is_locked
    copied.n_heads, copied.dtype = 6, torch.float16
    copied.attn_types[0] = copied.rotary_layers[0] = "other"
    assert (cfg.n_heads, cfg.dtype) == (3, torch.float64)
    assert (cfg.attn_types, cfg.rotary_layers) == (["local", "global"], [True, False])
    assert owner.calls == []


def test_a_locked_config_reads_as_an_unlocked_one() -> None:
    plain, locked = tiny_config(window_size=3), locked_config(window_size=3)
    assert repr(locked) == repr(plain)
    assert locked.to_dict() == plain.to_dict()
    assert type(locked.to_dict()["attn_types"]) is list
    assert json.dumps(dataclasses.asdict(locked) | {"dtype": ""}) == json.dumps(
        dataclasses.asdict(plain) | {"dtype": ""}
    )
    assert "_lock" not in {field.name for field in dataclasses.fields(locked)}


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.append("local"),
        lambda layers: layers.pop(),
        lambda layers: layers.sort(),
        lambda layers: layers.__setitem__(0, "global"),
        lambda layers: layers.__delitem__(0),
        lambda layers: layers.__iadd__(["local"]),
        lambda layers: layers.extend(["local"]),
    ],
)
def test_a_list_of_a_locked_config_cannot_be_changed_in_place(change: Callable[[list[str]], object]) -> None:
    cfg = locked_config(window_size=3, attn_types=["local", "global"])
    assert cfg.attn_types is not None
    with pytest.raises(TypeError, match="changing this list would change nothing"):
        change(cfg.attn_types)
    assert cfg.attn_types == ["local", "global"]


def test_the_lock_does_not_keep_a_weakly_held_owner_alive() -> None:
    owner = Owner()
    cfg = tiny_config()
    told = weakref.WeakMethod(owner.told)
    cfg.lock(lambda name, value: told())
    gone = weakref.ref(owner)
    del owner
    assert gone() is None
