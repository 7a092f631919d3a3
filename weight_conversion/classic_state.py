"""State dicts of the classic library, in this library's names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

__all__ = ["from_classic"]

Weights = dict[str, Tensor]

_CLASSIC_BUFFERS = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos|alibi)")
_CLASSIC_GROUPED = re.compile(r"(blocks\.\d+\.attn\.)_([Wb]_[KV])")
_CLASSIC_EXPERT = re.compile(r"(blocks\.\d+\.mlp\.)experts\.(\d+)\.([Wb]_(?:in|gate|out))(\.weight)?")
_CLASSIC_ROUTER = re.compile(r"(blocks\.\d+\.mlp\.W_gate)\.weight")


def from_classic(state_dict: Weights) -> Weights:
    """Return a state dict in this library's names from one that the classic library may have saved.

    Buffers are dropped by name, `_W_K`-style grouped names lose their underscore, experts are stacked, and biases that
    the classic library lacks become zero. Names of this library pass through.

    Args:
        state_dict: tensors by their names; it is not changed.

    Raises:
        ValueError: a gated MLP with a non-zero `b_in`, which the classic library added after the product of gate and
            input, where this one adds it before; or two different tensors for one weight.
    """
    weights: Weights = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in state_dict.items():
        if _CLASSIC_BUFFERS.fullmatch(name):
            continue
        expert = _CLASSIC_EXPERT.fullmatch(name)
        if expert:
            experts.setdefault(expert[1] + expert[3], {})[int(expert[2])] = value.T if expert[4] else value
        elif _CLASSIC_ROUTER.fullmatch(name):
            weights[name.removesuffix(".weight")] = value.T
        else:
            ours = _CLASSIC_GROUPED.sub(r"\1\2", name)
            if ours in weights and not torch.equal(weights[ours], value):
                raise ValueError(f"the state dict has {ours} with and without an underscore, and the two differ")
            weights[ours] = value
    # The classic router of a mixture is its `W_gate`, a name that here belongs to the experts.
    for prefix in {name.rpartition(".")[0] for name in experts}:
        if f"{prefix}.W_gate" in weights:
            weights[f"{prefix}.W_router"] = weights.pop(f"{prefix}.W_gate")
    for name, by_number in experts.items():
        weights[name] = torch.stack([by_number[number] for number in sorted(by_number)])
        W, _, which = name.rpartition(".")[2].partition("_")
        bias = f"{name.rpartition('.')[0]}.b_{which}"
        if W == "W" and bias not in experts and which != "gate":
            weights[bias] = weights[name].new_zeros((len(by_number), weights[name].shape[-1]))
    return _with_absent_biases(weights)


def _with_absent_biases(weights: Weights) -> Weights:
    added = {}
    for name, value in weights.items():
        prefix, _, last = name.rpartition(".")
        pairs = {"W_gate": "b_gate", "W_router": "b_router"}
        if prefix.endswith(".mlp") and last in pairs and f"{prefix}.{pairs[last]}" not in weights:
            b_in = weights.get(f"{prefix}.b_in")
            if b_in is None:
                continue  # a part of a state dict: the biases that are not in it stay as they are
            if last == "W_gate" and bool(b_in.any()):
                raise ValueError(
                    f"{prefix}.b_in is not zero and {prefix}.b_gate is absent: the classic library added b_in after "
                    "the product of gate and input, which this model cannot express"
                )
            added[f"{prefix}.{pairs[last]}"] = value.new_zeros((*value.shape[:-2], value.shape[-1]))
    return {**weights, **added}
