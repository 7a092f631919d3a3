"""Reading a HuggingFace config: a field is used, ignored by name, without effect in the reference, or an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from weight_conversion.errors import CheckpointError

__all__ = ["GENERIC_FIELDS", "Arguments", "ConfigFields", "Effects", "FieldValue", "HFConfig"]

# The value of a field is a number, a string, a list or another dictionary, depending on the field's name. Its type is
# left open, and `HookedTransformerConfig` checks the arguments that a family makes of it.
FieldValue = Any
HFConfig = dict[str, FieldValue]
# Arguments of a `HookedTransformerConfig`.
Arguments = dict[str, FieldValue]

# Fields of every transformers config that do not change the function a model computes.
GENERIC_FIELDS = frozenset(
    [
        "_name_or_path",
        # Written by the GGUF reader of transformers.
        "_model_name_or_path",
        "_commit_hash",
        "_num_labels",
        "_attn_implementation",
        "_attn_implementation_autoset",
        # Implementations of one function; those that differ from it raise in transformers.
        "attn_implementation",
        "architectures",
        "auto_map",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "gradient_checkpointing",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        # A model of a decoder-only class is a decoder whatever the field holds.
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "sep_token_id",
        # The shape of a classification head.
        "summary_activation",
        "summary_first_dropout",
        "summary_last_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "suppress_tokens",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "bad_words_ids",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "unk_token_id",
    ]
)


class Effects(Protocol):
    """What is known of the reference implementation: `Reference`, or anything that answers as it does."""

    def matters(self, name: str, value: FieldValue) -> bool:
        """Whether a field that is left out may change what the reference computes.

        Args:
            name: the field.
            value: its value.
        """

    def reads(self, name: str) -> bool:
        """Whether the reference may read an entry of a dictionary within a config.

        Args:
            name: the entry.
        """


class ConfigFields:
    """The fields of one HuggingFace config. Each has to be taken, ignored by name, or required to have one value.

    Fields that the reference implementation neither defines nor reads are exempt: they are kept and reported.

    Args:
        fields: the whole config as a dictionary, defaults included.
        family: the name of the family, for messages.
        reference: says which fields have an effect; without one, every field has.
        ignored: fields that the user asked to ignore: they are read as if they were not there.

    Attributes:
        without_effect: the fields that `finish` has found to be without effect, with their values.
    """

    def __init__(
        self,
        fields: Mapping[str, FieldValue],
        family: str,
        reference: Effects | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        self._fields = {name: value for name, value in fields.items() if name not in ignored}
        self.family, self._reference, self._ignored = family, reference, ignored
        self._unread = set(self._fields) - GENERIC_FIELDS
        self._is_part = False
        self.without_effect: dict[str, FieldValue] = {}

    def part(self, fields: Mapping[str, FieldValue], name: str) -> ConfigFields:
        """Return a reader of a dictionary within this config; what it finds without effect is reported with this one's.

        Args:
            fields: the dictionary.
            name: what it is, for messages.
        """
        part = ConfigFields(fields, f"{self.family} {name}", self._reference, self._ignored)
        part._is_part, part.without_effect = True, self.without_effect
        return part

    def take(self, name: str) -> FieldValue:
        """Return a field's value.

        Raises:
            CheckpointError: the config has no such field.
        """
        if name not in self._fields:
            raise CheckpointError(f"the {self.family} config lacks {name!r}; it has {sorted(self._fields)}")
        self._unread.discard(name)
        return self._fields[name]

    def get(self, name: str, default: FieldValue) -> FieldValue:
        """Return a field's value, or a default for a config without the field.

        Args:
            name: the field.
            default: the value for a config without the field.
        """
        return self.take(name) if name in self._fields else default

    def ignore(self, *names: str) -> None:
        """Leave fields unused on purpose: they do not change what a trained model computes."""
        self._unread.difference_update(names)

    def require(self, name: str, value: FieldValue) -> None:
        """Check that a field has the one value that is supported.

        Args:
            name: the field, which may be absent.
            value: the supported value.

        Raises:
            CheckpointError: it has another value.
        """
        found = self._fields.get(name, value)
        if found != value:
            raise CheckpointError(f"{self.family} with {name}={found!r} is not supported; only {value!r} is")
        self._unread.discard(name)

    def finish(self) -> None:
        """Check that every field has been read or ignored, or is without effect in the reference.

        Raises:
            CheckpointError: some fields have been neither read nor ignored, and may change what the model computes.
        """
        unread = {name: self._fields[name] for name in sorted(self._unread)}
        matter = {name: value for name, value in unread.items() if self._matters(name, value)}
        self.without_effect |= {name: value for name, value in unread.items() if name not in matter}
        if matter:
            raise CheckpointError(
                f"the {self.family} config has fields that its conversion does not know: {matter}. They may change "
                "what the model computes, so they are not skipped: handle them in weight_conversion/families, or, if "
                f"you know that they do not matter here, pass ignore_config_fields={sorted(matter)} to from_pretrained"
            )

    def _matters(self, name: str, value: FieldValue) -> bool:
        if self._reference is None:
            return True
        # The defaults of a config are not those of a dictionary within it.
        return self._reference.reads(name) if self._is_part else self._reference.matters(name, value)
