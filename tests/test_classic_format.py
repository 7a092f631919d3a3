"""Folders in the classic library's format, as its small models were published."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import CheckpointError, HookedTransformer
from tests.helpers import VOCAB, tiny_gpt2, tiny_model, tiny_tokenizer, tiny_tokens
from tests.loading_helpers import edit_json, unprocessed

TOKENS = tiny_tokens()
# The words in which the published configs are written.
CONFIG = {
    "n_layers": 2,
    "d_model": 12,
    "n_heads": 3,
    "d_head": 4,
    "d_mlp": 48,
    "n_ctx": 16,
    "d_vocab": 20,
    "act_fn": "solu_ln",
    "attn_only": False,
    "normalization": "LN",
    "final_rms": False,
    "seed": 42,
    "device": "cuda",
}
# Kinds of published models: what their configs change.
KINDS: dict[str, dict[str, Any]] = {
    "solu": {},
    "gelu": {"act_fn": "gelu"},
    "attn-only": {"attn_only": True},
    "shortformer": {"attn_only": True, "shortformer_pos": True},
    "final rms": {"act_fn": "gelu", "final_rms": True},
}


def model_of(content: dict[str, Any]) -> HookedTransformer:
    fields = {name: content[name] for name in ("act_fn", "attn_only", "final_rms")}
    kind = "shortformer" if content.get("shortformer_pos") else "standard"
    return tiny_model(**fields, positional_embedding_type=kind, normalization_type="LN", dtype=torch.float32)


def write(folder: Path, content: dict[str, Any], state: dict[str, Tensor], name: str = "model_final.pth") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(state, folder / name)


def with_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the buffers that the classic library saves."""
    mask = {f"blocks.{layer}.attn.mask": torch.ones(16, 16).tril().bool() for layer in range(2)}
    return {**state, **mask, "blocks.0.attn.IGNORE": torch.tensor(-1e5)}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_folder_as_they_were_published_loads(kind: str, tmp_path: Path) -> None:
    content = {**CONFIG, **KINDS[kind]}
    theirs = model_of(content)
    write(tmp_path, content, with_buffers(theirs.state_dict()))
    ours = unprocessed(tmp_path)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert ours.cfg.device == "cpu"
    processed = HookedTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(processed(TOKENS).log_softmax(-1), theirs(TOKENS).log_softmax(-1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_config_that_a_classic_model_has_loads_too(tmp_path: Path) -> None:
    theirs = tiny_model(positional_embedding_type="rotary", n_key_value_heads=1, normalization_type="RMS")
    state = {name.replace("attn.W_K", "attn._W_K"): value for name, value in theirs.state_dict().items()}
    write(tmp_path, {**theirs.cfg.to_dict(), "dtype": "float64"}, state, "model.pt")
    ours = unprocessed(tmp_path)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert ours.cfg.dtype is torch.float64
    assert unprocessed(tmp_path, first_n_layers=1).cfg.n_layers == 1


@torch.no_grad()
def test_biases_that_a_model_was_trained_without_are_zero(tmp_path: Path) -> None:
    theirs = model_of(CONFIG)
    without = {name: value for name, value in theirs.state_dict().items() if ".b_" not in name}
    for name, value in theirs.state_dict().items():
        if ".b_" in name:
            value.zero_()
            theirs.get_parameter(name).zero_()
    write(tmp_path, CONFIG, without)
    assert torch.equal(unprocessed(tmp_path)(TOKENS), theirs(TOKENS))


def early(n_layers: int, *, square: bool = False, norms: bool = True) -> tuple[HookedTransformer, dict[str, Tensor]]:
    """One of the first SoLU models, and its tensors as they were published, with the norms' names of then or of now."""
    fields = {"n_ctx": 12} if square else {}
    theirs = tiny_model(n_layers=n_layers, act_fn="solu_ln", normalization_type="LN", dtype=torch.float32, **fields)
    state = {}
    for name, value in theirs.state_dict().items():
        position = name == "pos_embed.W_pos"
        turned = (position and n_layers <= 8) or (".W_" in name and not position and n_layers <= 6)
        old = name.replace("ln_final.", "norm.").replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
        state[old.replace(".mlp.ln.", ".mlp.norm.") if norms else name] = value.mT if turned else value
    return theirs, state


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("n_layers", [6, 8, 10])
@torch.no_grad()
def test_the_first_solu_models_are_turned_round(n_layers: int, square: bool, norms: bool, tmp_path: Path) -> None:
    """Whatever their folder is called, as long as a name or a shape tells."""
    theirs, state = early(n_layers, square=square, norms=norms)
    write(tmp_path / "mine", {**CONFIG, "n_layers": n_layers, "n_ctx": theirs.cfg.n_ctx}, state)
    if n_layers == 8 and square and not norms:
        with pytest.raises(CheckpointError, match=r"8 layers whose W_pos is square.*Add \"architecture\""):
            unprocessed(tmp_path / "mine")
        (tmp_path / "mine").rename(tmp_path / "SoLU_8L_v21_old")
        assert torch.equal(unprocessed(tmp_path / "SoLU_8L_v21_old")(TOKENS[:, :12]), theirs(TOKENS[:, :12]))
        (tmp_path / "SoLU_8L_v21_old").rename(tmp_path / "mine")
        edit_json(tmp_path / "mine" / "config.json", architecture="neel-solu-old")
    assert torch.equal(unprocessed(tmp_path / "mine")(TOKENS[:, :12]), theirs(TOKENS[:, :12]))


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("models--NeelNanda--SoLU_8L1024W_C4_Code", {}),
        ("mine", {"architecture": "neel"}),
        ("mine", {"positional_embedding_type": "standard"}),
        ("mine", {"act_fn": "gelu"}),
        ("mine", {"n_layers": 6}),
    ],
)
@torch.no_grad()
def test_a_square_position_embedding_of_a_later_model_stays_as_it_is(
    folder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    content = {**CONFIG, "n_layers": 8, "n_ctx": 12, **changes}
    fields = {"act_fn": content["act_fn"], "normalization_type": "LN", "dtype": torch.float32}
    theirs = tiny_model(n_layers=content["n_layers"], n_ctx=12, **fields)
    write(tmp_path / folder, content, theirs.state_dict())
    assert torch.equal(unprocessed(tmp_path / folder)(TOKENS[:, :12]), theirs(TOKENS[:, :12]))


def mingpt_state(theirs: Any, width: int) -> dict[str, Tensor]:
    """The tensors of a GPT-2 under minGPT's names, each linear map as [out in]."""
    body = theirs.transformer
    state = {
        "tok_emb.weight": body.wte.weight,
        "pos_emb": body.wpe.weight[None],
        "ln_f.weight": body.ln_f.weight,
        "ln_f.bias": body.ln_f.bias,
        "head.weight": theirs.lm_head.weight,
    }
    for layer, block in enumerate(body.h):
        at = f"blocks.{layer}"
        parts = {"proj": (block.attn.c_proj.weight, block.attn.c_proj.bias)}
        weights, biases = block.attn.c_attn.weight.split(width, 1), block.attn.c_attn.bias.split(width)
        parts |= dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))
        for part, (weight, bias) in parts.items():
            state |= {f"{at}.attn.{part}.weight": weight.T, f"{at}.attn.{part}.bias": bias}
        state[f"{at}.attn.mask"] = torch.ones(1, 1, 32, 32)
        for number, linear in (("0", block.mlp.c_fc), ("2", block.mlp.c_proj)):
            state |= {f"{at}.mlp.{number}.weight": linear.weight.T, f"{at}.mlp.{number}.bias": linear.bias}
        for norm, module in (("ln1", block.ln_1), ("ln2", block.ln_2)):
            state |= {f"{at}.{norm}.weight": module.weight, f"{at}.{norm}.bias": module.bias}
    return {name: value.detach().contiguous() for name, value in state.items()}


@torch.no_grad()
def test_a_model_trained_in_mingpt_has_the_logits_of_the_same_gpt2(tmp_path: Path) -> None:
    """As Othello-GPT was published."""
    theirs: Any = tiny_gpt2(activation_function="gelu")
    sizes = {"n_layers": 3, "d_model": 24, "n_heads": 4, "d_head": 6, "d_mlp": 96, "n_ctx": 32, "d_vocab": VOCAB}
    content = {**CONFIG, **sizes, "act_fn": "gelu", "architecture": "mingpt"}
    write(tmp_path, content, mingpt_state(theirs, 24), "synthetic_final.pth")
    tokens = tiny_tokens(vocab=VOCAB)
    assert (unprocessed(tmp_path)(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_a_tokenizer_beside_the_weights_is_the_model_s(tmp_path: Path) -> None:
    theirs = tiny_model(d_vocab=VOCAB, act_fn="gelu", normalization_type="LN")
    write(tmp_path, {**CONFIG, "act_fn": "gelu", "d_vocab": VOCAB}, theirs.state_dict())
    tiny_tokenizer().save_pretrained(tmp_path)
    assert unprocessed(tmp_path).to_tokens("a store").shape[0] == 1


def test_a_tokenizer_that_is_not_found_does_not_stop_the_load(tmp_path: Path) -> None:
    content = {**CONFIG, "tokenizer_name": str(tmp_path / "nowhere")}
    write(tmp_path, content, model_of(CONFIG).state_dict())
    with pytest.warns(UserWarning, match="tokens only"):
        assert unprocessed(tmp_path).tokenizer is None


def test_fields_about_the_training_are_listed_once(tmp_path: Path) -> None:
    write(tmp_path, {**CONFIG, "lr": 1e-3, "batch_size": 8}, model_of(CONFIG).state_dict())
    with pytest.warns(UserWarning, match="no config reads: batch_size, lr"):
        unprocessed(tmp_path)


def test_a_surplus_or_missing_tensor_is_named(tmp_path: Path) -> None:
    state = model_of(CONFIG).state_dict()
    write(tmp_path, CONFIG, {**state, "blocks.0.attn.W_X": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.W_X has no place"):
        unprocessed(tmp_path)
    write(tmp_path, CONFIG, {name: value for name, value in state.items() if name != "blocks.1.mlp.W_in"})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.W_in is missing"):
        unprocessed(tmp_path)


def test_of_several_files_the_one_of_the_end_of_training_is_read(tmp_path: Path) -> None:
    theirs = model_of(CONFIG)
    write(tmp_path, CONFIG, theirs.state_dict())
    torch.save({}, tmp_path / "step_100.pth")
    assert torch.equal(unprocessed(tmp_path)(TOKENS), theirs(TOKENS))
    torch.save({}, tmp_path / "other_final.pth")
    with pytest.raises(CheckpointError, match=r"several files of weights: model_final\.pth, other_final\.pth"):
        unprocessed(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_pickle_of_anything_but_tensors_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, CONFIG, {})
    (tmp_path / "model_final.pth").write_bytes(pickle.dumps({"embed.W_E": Harmful()}))
    with pytest.raises(CheckpointError, match="not unpickled"):
        unprocessed(tmp_path)
    assert "it ran" not in capsys.readouterr().out


def test_a_value_that_no_config_may_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, model_of(CONFIG).state_dict())
    edit_json(tmp_path / "config.json", act_fn="sine")
    with pytest.raises(CheckpointError, match=r"config\.json does not hold a whole config: .*sine"):
        unprocessed(tmp_path)
