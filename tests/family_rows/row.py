"""What a row of the family table is: a tiny random checkpoint of one family, chosen so that its features bite."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Row:
    """One tiny model of `transformers`.

    Attributes:
        id: the family, and what is special about this variant.
        architecture: the transformers class, such as `"LlamaForCausalLM"`.
        config: the class of its config, such as `"LlamaConfig"`.
        fields: of the config. Vocabulary 60 unless they say otherwise.
        pos: how long a sequence has to be for every feature to matter.
        float64: the reference computes in float64 throughout when asked to, so that 1e-9 can be demanded.
        invertible: a model can be written back as a checkpoint.
        features: what `fields` must hold for each feature to matter: name -> the changes that turn it off. The
            reference's logits differ by more than the tolerance when one is off.
        attention: which of the reference's implementations of attention is the one to trust.
    """

    id: str
    architecture: str
    config: str
    fields: dict[str, Any]
    pos: int = 12
    float64: bool = False
    invertible: bool = True
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: str = "eager"

    def hf_config(self, **changes: Any) -> Any:
        """Return the transformers config."""
        common = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        return getattr(transformers, self.config)(**{**common, **self.fields, **changes})

    def build(self, seed: int = 0, **changes: Any) -> Any:
        """Return the transformers model with every parameter random, in eval mode."""
        model = getattr(transformers, self.architecture)._from_config(
            self.hf_config(**changes), attn_implementation=self.attention
        )
        return randomise_reference(model.eval(), seed)

    def config_fields(self) -> dict[str, Any]:
        """Return the fields that the family reads: those of config.json, with defaults."""
        fields: dict[str, Any] = self.hf_config().to_dict()
        return fields

    def save(self, model: Any, folder: Path) -> None:
        """Write the transformers model as a checkpoint of the row's architecture."""
        model.save_pretrained(folder)

    def load(self, folder: Path, **options: Any) -> Any:
        """Return the transformers model of a checkpoint of the row's architecture."""
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=self.attention, **options).eval()

    def reference(self, folder: Path) -> nn.Module | None:
        """Return the model that a certificate of a checkpoint has to be given; None if transformers loads it."""
        return None

    def tokens(self, batch: int = 2, seed: int = 1) -> torch.Tensor:
        """Return random tokens [batch pos], none of them special."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 60, (batch, self.pos), generator=generator)


def randomise_reference(model: nn.Module, seed: int = 0, std: float = 0.25) -> nn.Module:
    """Draw every parameter anew: matrices and biases around 0, vectors that were all ones (gains) around 1.

    So is what corrects the choice of experts, which is a buffer in most models.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        corrections = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter in (*model.parameters(), *corrections):
            is_gain = bool((parameter == 1).all())
            parameter.normal_(1.0 if is_gain else 0.0, std, generator=generator)
    return model
