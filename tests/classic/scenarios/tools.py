"""The utilities, by themselves."""

from __future__ import annotations

from typing import Any

import torch

from tests.classic.library import Library
from tests.classic.rules import numbers, tokens
from tests.classic.scenario import Outcome, scenario
from tests.classic.words import word_tokenizer


@scenario()
def names(lib: Library) -> Outcome:
    given: list[tuple[Any, ...]] = [
        *(("embed",), ("pos_embed",), ("scale", 4, "ln1"), ("scale", None), ("normalized", 2, "ln2"), ("k", 6)),
        *(("k6",), ("resid_pre", 2), ("attn", 3), ("pre2",), ("mlp_post", 1), ("scale4ln1",), ("pre", 5, "mlp")),
        *(("hook_embed",), ("blocks.2.attn.hook_q",), ("attn_scores", 0)),
        *(("mlp_out", 2), ("result", 1, "attn"), ("post", 0, "m"), ("q", 0, "a"), ("attn_logits", 0)),
        *(("ln_final.hook_scale",), ("rot_q", 3), ("q_input", 1), ("mlp_in", 1), ("resid_post", -1)),
    ]
    out: Outcome = {}
    for arguments in given:
        try:
            out[repr(arguments)] = lib.utils.get_act_name(*arguments)
        except Exception:
            out[repr(arguments)] = "refused"
    return out


@scenario()
def slices(lib: Library) -> Outcome:
    given = numbers("sliced", (3, 6, 2))
    out: Outcome = {}
    for name, value in {
        "int": 1,
        "last": -1,
        "pair": (1, 4),
        "triple": (0, 6, 2),
        "list": [0, 3],
        "none": None,
    }.items():
        cut = lib.utils.Slice(value)
        out[f"{name} applied"] = cut.apply(given, dim=1)
        out[f"{name} applied first"] = cut.apply(given[:, :6].transpose(0, 1), dim=0)
        out[f"{name} mode"] = cut.mode
        if name != "last":
            out[f"{name} indices"] = torch.as_tensor(cut.indices(6))
    out["array"] = lib.utils.Slice(torch.tensor([2, 0]).numpy()).apply(given, dim=1)
    out["tensor"] = lib.utils.Slice(torch.tensor([2, 0])).apply(given, dim=1)
    return out


@scenario()
def losses(lib: Library) -> Outcome:
    logits, given = numbers("logits", (2, 5, 11)), tokens(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    utils = lib.utils
    return {
        "loss": utils.lm_cross_entropy_loss(logits, given),
        "per token": utils.lm_cross_entropy_loss(logits, given, per_token=True),
        "masked": utils.lm_cross_entropy_loss(logits, given, attention_mask=mask),
        "masked per token": utils.lm_cross_entropy_loss(logits, given, attention_mask=mask, per_token=True),
        "accuracy": utils.lm_accuracy(logits, given),
        "accuracy per token": utils.lm_accuracy(logits, given, per_token=True),
    }


@scenario()
def activation_functions(lib: Library) -> Outcome:
    given = 2 * numbers("activations", (2, 3, 6))
    return {name: getattr(lib.utils, name)(given) for name in ("gelu_new", "gelu_fast", "solu")}


@scenario()
def shapes(lib: Library) -> Outcome:
    utils, given = lib.utils, numbers("shapes", (2, 4, 4))
    return {
        "square": [utils.is_square(given[0]), utils.is_square(given[0, :2]), utils.is_square(torch.ones(3))],
        "lower": [utils.is_lower_triangular(given[0].tril()), utils.is_lower_triangular(given[0])],
        "transposed": utils.transpose(given[:, :2]),
        "corner": utils.get_corner(given, 2),
        "corner of three": utils.get_corner(given),
        "no batch": utils.remove_batch_dim(given[:1]),
        "batch kept": utils.remove_batch_dim(given),
        "repeated": utils.repeat_along_head_dimension(given, 3),
        "array": utils.to_numpy(given),
        "array of a list": utils.to_numpy([1, 2]),
        "array of a number": utils.to_numpy(3.0),
        "array of a parameter": utils.to_numpy(torch.nn.Parameter(given)),
        "array of bfloat16": utils.to_numpy(torch.ones(2)),
        "summed": utils.get_cumsum_along_dim(given, -1),
        "summed backwards": utils.get_cumsum_along_dim(given, 1, reverse=True),
        "positions": utils.get_offset_position_ids(1, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])),
        "fans": list(utils.calc_fan_in_and_fan_out(given)),
        "fans of a matrix": list(utils.calc_fan_in_and_fan_out(given[0, :2])),
        "fans of a vector": list(utils.calc_fan_in_and_fan_out(given[0, 0])),
        "default": utils.override_or_use_default_value(True, None),
        "overridden": utils.override_or_use_default_value(True, False),
    }


@scenario()
def samples(lib: Library) -> Outcome:
    logits, sample = numbers("samples", (3, 11)), lib.utils.sample_logits
    peaked = torch.where(torch.arange(11) == 4, 40.0, logits)
    seen = torch.tensor([[4, 4, 4], [1, 2, 3], [4, 5, 6]])
    return {
        "greedy": sample(logits, temperature=0.0),
        "of one": sample(logits, top_k=1),
        "of little": sample(logits, top_p=1e-6),
        "peaked": sample(peaked),
        "cold": sample(logits, temperature=1e-5),
        "penalised": sample(peaked[:, :11], top_k=1, freq_penalty=30.0, tokens=seen),
        "repetition": sample(logits, top_k=1, repetition_penalty=3.0, tokens=seen),
    }


@scenario()
def initialisers(lib: Library) -> Outcome:
    out: Outcome = {}
    for name in ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"):
        weight = torch.empty(64, 200)
        getattr(lib.utils, f"init_{name}_")(weight)
        out[name] = round(float(100 * weight.std()))
        out[f"{name} largest"] = round(float(10 * weight.abs().max())) if "uniform" in name else 0
    return out


@scenario()
def tokenizers_with_bos(lib: Library) -> Outcome:
    return {
        "with": lib.utils.get_tokenizer_with_bos(word_tokenizer()).encode("the cat"),
        "without": word_tokenizer().encode("the cat"),
    }


@scenario("text_plain")
def tables(lib: Library, model: Any) -> Outcome:
    frame = lib.utils.logits_to_df(numbers("row", (40,)), model.tokenizer, top_k=4)
    return {"columns": list(frame.columns), "rows": len(frame), "first": str(frame.iloc[0].to_list()[:2])}


PATTERNS = ("previous_token_head", "duplicate_token_head", "induction_head")
TEXT = "the cat sat on the cat sat on"


@scenario("text_plain", "text_rotary", "text_attn_only")
def detected_heads(lib: Library, model: Any) -> Outcome:
    detect = lib.head_detector.detect_head
    out: Outcome = {}
    for name in PATTERNS:
        for measure in ("mul", "abs"):
            out[f"{name} {measure}"] = detect(model, TEXT, name, error_measure=measure)
        out[f"{name} without BOS"] = detect(model, TEXT, name, exclude_bos=True, exclude_current_token=True)
        out[f"{name} without BOS, abs"] = detect(
            model, TEXT, name, exclude_bos=True, exclude_current_token=True, error_measure="abs"
        )
    out["some"] = detect(model, TEXT, "induction_head", heads=[(0, 1), (1, 0)])
    out["some by layer"] = detect(model, TEXT, "induction_head", heads={0: [1], 1: [0, 1]})
    out["several texts"] = detect(model, [TEXT, "a dog ran to the dog"], "duplicate_token_head")
    own = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    out["own"] = detect(model, TEXT, own)
    cache = model.run_with_cache(TEXT, remove_batch_dim=True)[1]
    out["cached"] = detect(model, TEXT, "previous_token_head", cache=cache)
    return out


@scenario()
def detection_patterns(lib: Library) -> Outcome:
    given = torch.tensor([[1, 4, 5, 4, 5, 4]])
    return {name: getattr(lib.head_detector, f"get_{name}_detection_pattern")(given) for name in PATTERNS}


@scenario("text_plain")
def evaluations(lib: Library, model: Any) -> Outcome:
    dataset = lib.evals.IOIDataset(
        model.tokenizer,
        templates=["When [A] and [B] went to the [PLACE], [B] gave a drink to [A]"],
        names=["John", "Mary"],
        nouns={"PLACE": ["store"]},
        num_samples=6,
        symmetric=True,
        seed=0,
    )
    out: Outcome = {
        "size": len(dataset),
        "keys": sorted(dataset[0]),
        "samples": sorted(s["text"] for s in dataset.samples),
    }
    out["accuracy"] = {name: float(value) for name, value in lib.evals.ioi_eval(model, dataset=dataset).items()}
    return out
