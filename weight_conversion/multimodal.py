"""Multimodal checkpoints whose text decoder is of a supported family: the decoder's config and its tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weight_conversion.errors import CheckpointError
from weight_conversion.fields import FieldValue
from weight_conversion.source import TensorSource

__all__ = ["MULTIMODAL", "decoder_class", "is_multimodal", "text_part"]

# Models that, given text alone, compute what their text decoder computes. The tests compare each of them.
MULTIMODAL = frozenset(
    [
        "AyaVisionForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
    ]
)
# The decoder's own class of transformers, by the model type of the text config.
_DECODERS = {
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
# What stands before the names of the decoder's tensors, longer ones first. Files of today and of older versions differ.
_OF_TEXT = (
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.text_model.",
)
# The other parts of these models, by the beginnings of their tensors' names.
_OTHER_PARTS = ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "connector.", "image_newline")
# Entries of rotary parameters that spread positions over time, height and width. In a text the three are one and the
# same, and the angles are those of ordinary rotary positions.
_OF_THREE_AXES = ("mrope_section", "mrope_interleaved")

# What a decoder's own class does to its logits. The class around it has an unembedding of its own, and does not.
_WITHOUT_OWN_HEAD = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}


def is_multimodal(fields: Mapping[str, FieldValue]) -> bool:
    """Return whether a HuggingFace config is of a multimodal model whose text part can be loaded."""
    architectures = fields.get("architectures")
    return isinstance(architectures, (list, tuple)) and len(architectures) == 1 and architectures[0] in MULTIMODAL


def decoder_class(text: Mapping[str, FieldValue]) -> str:
    """Return the class of transformers that a multimodal model's text decoder has by itself.

    Args:
        text: the config of the decoder.

    Raises:
        CheckpointError: the decoder is of no supported kind.
    """
    kind = text.get("model_type")
    if kind not in _DECODERS:
        raise CheckpointError(
            f"a multimodal model whose text decoder is of the kind {kind!r} is not supported; {sorted(_DECODERS)} are"
        )
    return _DECODERS[kind]


def text_part(fields: Mapping[str, FieldValue], tensors: TensorSource) -> tuple[dict[str, FieldValue], TensorSource]:
    """Return the config and the tensors of the text decoder. A warning says what is left out.

    Args:
        fields: the whole config, with the defaults of transformers.
        tensors: the whole checkpoint.

    Returns:
        A config as the decoder's own class has it, and the tensors under the names of that class.

    Raises:
        CheckpointError: the decoder is of no supported kind.
    """
    (whole,) = fields["architectures"]
    text = dict(fields["text_config"])
    decoder = decoder_class(text)
    text["architectures"] = [decoder]
    # The class around the decoder owns the unembedding, and its config says whether that is tied.
    text["tie_word_embeddings"] = fields.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    text |= {name: value for name, value in _WITHOUT_OWN_HEAD.items() if name in text}
    if text["model_type"] == "qwen3_vl_text":
        # Where Qwen3 has a window in some layers, this decoder has none in any.
        text |= {"layer_types": ["full_attention"] * text["num_hidden_layers"], "sliding_window": None}
    text["rope_parameters"] = _of_one_axis(text.get("rope_parameters"))
    kept = _TextTensors(tensors)
    warnings.warn(
        f"of this {whole} only the text decoder is loaded, a {decoder}: {len(tensors) - len(kept)} tensors "
        f"of its other parts ({', '.join(sorted(kept.left_out))}) are left out",
        stacklevel=2,
    )
    return text, kept


def _of_one_axis(parameters: FieldValue) -> FieldValue:
    """Rotary parameters without what only positions in pictures need."""
    if not isinstance(parameters, Mapping):
        return parameters
    plain = {name: value for name, value in parameters.items() if name not in _OF_THREE_AXES}
    for name in ("rope_type", "type"):
        if plain.get(name) == "mrope":
            plain[name] = "default"
    return plain


class _TextTensors(TensorSource):
    """The tensors of the text decoder, without what stands before its names in the whole checkpoint.

    Attributes:
        left_out: the parts whose tensors are dropped, by name.
    """

    def __init__(self, whole: TensorSource) -> None:
        self._whole = whole
        self._full: dict[str, str] = {}
        self.left_out: set[str] = set()
        for name in whole:
            part = name.removeprefix("model.")
            if part.startswith(_OTHER_PARTS):
                self.left_out.add(part.partition(".")[0])
                continue
            prefix = next((prefix for prefix in _OF_TEXT if name.startswith(prefix)), "")
            bare = name.removeprefix(prefix)
            if bare in self._full:
                raise CheckpointError(f"the checkpoint has both {self._full[bare]!r} and {name!r}: two of one tensor")
            self._full[bare] = name

    @property
    def mapped(self) -> bool:  # type: ignore[override]
        """Whether the tensors are private views of a file."""
        return self._whole.mapped

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._full[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._whole.shape(self._full[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._whole.dtype(self._full[name])

    @property
    def config_digests(self) -> dict[Path, str | None]:
        return self._whole.config_digests

    def release(self) -> None:
        self._whole.release()

    def check(self) -> None:
        self._whole.check()

    def __contains__(self, name: object) -> bool:
        return name in self._full

    def __iter__(self) -> Iterator[str]:
        return iter(self._full)

    def __len__(self) -> int:
        return len(self._full)
