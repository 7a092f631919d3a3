"""What the tests of writing HuggingFace checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooked_lm import HookedTransformer


def tokens() -> Tensor:
    return torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = tensors_in(one), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def reference(folder: Path) -> Any:
    """What transformers loads from a folder; it may miss nothing and have nothing to spare."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def moved(model: HookedTransformer, *names: str, by: float = 0.3) -> HookedTransformer:
    """The model with some parameters changed at random, as an optimizer leaves them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model
