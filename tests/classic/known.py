"""The differences that are meant, as data; `test_known_differences.py` holds what is done here instead."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.classic.store import Flat, Leaf

# Draws differ, and so does where 16 bits are rounded.
LOOSE = {"properties/initial_weights": 0.05, "uses/half_precision": 0.02}
UNFOLDED = r"\[(plain|attn_only|parallel|rms|grouped|llama|both_sides|shortformer|gated|wide_heads)\]"


@dataclass(frozen=True)
class Known:
    """Outcomes that are not compared, since they differ on purpose.

    Attributes:
        scenario, path: patterns of the scenarios' names and of the outcomes' paths.
        why: what is done here, and why.
    """

    scenario: str
    path: str
    why: str

    def covers(self, scenario: str, path: str) -> bool:
        """Return whether this is about one outcome of a scenario."""
        return bool(re.fullmatch(self.scenario, scenario) and re.fullmatch(self.path, path))


KNOWN = (
    Known(r"models/(parameters|weight_gradients).*", r".*\.mlp\.b_gate", "a gated MLP has a bias on its gate"),
    Known(
        r"processing/(loading.*|steps_on_state_dicts)\[llama\]",
        r".*\.mlp\.b_gate",
        "a gated MLP has a bias on its gate",
    ),
    Known(r"models/weight_gradients.*", r".*\.mlp\.b_in", "a gated MLP adds b_in before the product"),
    Known(r"models/(parameters|weight_gradients)\[experts\]", r".*\.mlp\.b_(in|out|router)", "experts have biases"),
    Known(r"models/parameters\[(text_)?(alibi|embedding_norm)\]", r".*W_pos", "no parameter that nothing reads"),
    Known(r"processing/.*\[alibi\]", r"values/pos_embed\.W_pos", "no parameter that nothing reads"),
    Known(r"models/hook_names\[alibi\]", r"names/hook_pos_embed", "no hook point that nothing calls"),
    Known(r"models/hook_names\[attn_only\]", r".*\.hook_mlp_(in|out)", "no hook point that nothing calls"),
    Known(r"models/hook_names\[shortformer\]", r".*\.hook_attn_input", "no hook point that nothing calls"),
    Known(r"models/hook_names.*", r"names/hook_tokens", "every hook point exists, whatever the flags say"),
    Known(
        r"models/(activations|hook_names)\[experts\]",
        r".*\.experts\.\d\.hook_.*",
        "experts run together, without hooks of their own",
    ),
    Known(r"models/activations\[experts\]", r".*\.hook_expert_weights", "[batch pos expert], not [token expert]"),
    Known(r"models/activations\[experts\]", r".*\.hook_expert_indices", "integers are cached when they are named"),
    Known(r"models/activations\[(soft_caps|gemma)\]", r"values/unembed\.hook_out", "the logits that are returned"),
    Known(r"hooks/every_site_edited\[soft_caps\]", r"unembed\.hook_out", "the logits that are returned"),
    Known(r"models/activations\[qk_norm\]", r"values/.*\.hook_[qk]", "hook_q and hook_k stand after the norm"),
    Known(r"models/activations\[qk_norm\]", r".*\.[qk]_norm\..*", "the norm of queries and keys: shapes by head"),
    Known(r"models/activations\[clipped\]", r"values/.*\.hook_[qkv]", "hook_q, hook_k, hook_v stand after the clip"),
    Known(r"models/activation_gradients.*", r".*\.ln1\..*_grad", "one norm for q, k and v: its gradient is their sum"),
    Known(r"models/logits_under_masks\[(alibi|local|embedding_norm|gemma)\]", "holes", "holes are as if left out"),
    Known(r"models/logits_under_masks\[bidirectional\]", ".*", "masks act in bidirectional attention too"),
    Known(r"components/attention\[bidirectional\]", "masked", "masks act in bidirectional attention too"),
    Known(r"caches/accumulated.*", r"normed for (layer 1|an MLP)", "statistics of each partial sum, at every layer"),
    Known(r"caches/head_results.*", "remainder of none", "what enters layer 0, not the last layer's output"),
    Known(rf"caches/(decomposed|head_results|neuron_results|full_decomposition){UNFOLDED}", "normed", "gains act"),
    Known(rf"caches/(attributed_logits|normed_stacks){UNFOLDED}", "(?!recomputed).*", "gains act"),
    Known(r"patching/patterns.*", "by_pos", "[layer pos head], as the other grids by position"),
    Known(r"patching/heads_.*\[ungrouped\]", "[kv]", "every key and value there is, not the first few"),
    Known(r"matrices/singular_values", r".* Vh", "Vh is V transposed, as everywhere else"),
    Known(r"matrices/singular_values", r".* shapes/4", "Vh is V transposed, as everywhere else"),
    Known(
        r"properties/counts\[(grouped|grouped_rotary|ungrouped|llama|gemma)\]", "n_params", "keys and values that exist"
    ),
    Known(r"properties/config_values\[no_scale\]", "attn_scale", "the number that scores are divided by"),
    Known(r"text/padding_and_losses.*", "loss of padded texts", "padding has no part in a loss"),
    Known(r"uses/saved_configs.*", r"config|state/.*", "fields and buffers of its own: both are read"),
    Known(r"generation/penalties.*", "repetition|greedy with frequency", "a penalty acts wherever it is asked for"),
    Known(r"generation/streamed.*", r"texts.*", 'return_type="str" yields text'),
    Known(r"generation/from_embeddings.*", "tokens|embeddings", "new tokens stand behind the prompt, not twice as far"),
    Known(r"tools/evaluations.*", "accuracy/.*", "other words and templates"),
    Known(r"tools/detected_heads.*", r".* abs|.*, abs", "not rounded to three places"),
)


def known(scenario: str, path: str) -> Known | None:
    """Return why an outcome of a scenario differs on purpose, or None."""
    return next((one for one in KNOWN if one.covers(scenario, path)), None)


def compared(scenario: str, outcome: Flat) -> Flat:
    """Return an outcome without what differs on purpose."""
    return {path: value for path, value in outcome.items() if known(scenario, path) is None}


_EXPERT = re.compile(r"(.*)\.experts\.\d+\.(W_\w+)\.weight")


def as_named_here(outcome: Flat) -> Flat:
    """Return an outcome of the classic library with this library's names of parameters.

    There, keys and values of grouped queries have names with an underscore, and each expert is a module with weights
    [out in]; here experts are stacked, [expert in out], and their gate is the router. A shape is a list as text.
    """
    found: Flat = {}
    experts: dict[str, list[Leaf]] = {}
    for path, value in outcome.items():
        match = _EXPERT.fullmatch(path)
        if match:
            experts.setdefault(f"{match[1]}.{match[2]}", []).append(_transposed(value))
        elif path.endswith("mlp.W_gate.weight"):
            found[path.replace("W_gate.weight", "W_router")] = _transposed(value)
        else:
            found[re.sub(r"\._(W_K|W_V|b_K|b_V)$", r".\1", path)] = value
    return {**found, **{path: _stacked(values) for path, values in experts.items()}}


def _transposed(value: Leaf) -> Leaf:
    return value.T if isinstance(value, Tensor) else json.dumps(json.loads(str(value))[::-1])


def _stacked(values: list[Leaf]) -> Leaf:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return torch.stack(tensors) if tensors else json.dumps([len(values), *json.loads(str(values[0]))])
