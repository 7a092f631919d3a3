"""WeightLoading: how a model gets its weights, from checkpoints, state dicts and processing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from hooked_lm import bundled
from hooked_lm.config import HookedTransformerConfig
from hooked_lm.config.defaults import defaults
from hooked_lm.tokenization import Tokenizer
from hooked_lm.weights import keywords, processing
from hooked_lm.weights.methods import WeightProcessing
from hooked_lm.weights.placement import ParameterPlacement
from hooked_lm.weights.processing import Weights
from hooked_lm.weights.state_dicts import folded_away
from weight_conversion import checkpoint
from weight_conversion.classic_state import from_classic
from weight_conversion.hub import Hub

__all__ = ["WeightLoading"]


class WeightLoading(WeightProcessing):
    """The loading and processing methods of `HookedTransformer`."""

    # Checkpoints

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool | None = None,
        hf_model: checkpoint.HFModel = None,
        tokenizer: Tokenizer | Literal[False] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        checkpoint_index: int | None = None,
        checkpoint_value: int | None = None,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] | None = None,
        trust_remote_code: bool = False,
        ignore_config_fields: Collection[str] = (),
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        move_to_device: bool = True,
        model_name: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **without_effect: object,
    ) -> Self:
        """Return a trained model, its weights processed so that circuits are easier to read.

        Processing leaves the log-probabilities unchanged. For each step, None (the default) applies it where it
        preserves the model's function, True does the same and warns where it would not, and False leaves it out.
        `refactor_factored_attn_matrices` is off by default.

        Weights that need no change are views of the checkpoint's memory-mapped file; all others are copied once, block
        by block, and processed in place.

        Args:
            name_or_path: the name of a bundled model, an alias (`"gpt2-small"`, in upper or lower case), a HuggingFace
                hub id, a folder in HuggingFace's format, in that of `save_pretrained` or in the classic library's, a
                folder with a PEFT adapter, or a GGUF file. Of a multimodal model the text part is loaded.
            fold_ln: fold the norms' gains and biases into the weights that read from them.
            center_writing_weights: remove the mean over `d_model` from the weights that write to the residual stream.
            center_unembed: remove the mean over the vocabulary from the unembedding.
            fold_value_biases: move the value biases into attention's output bias.
            refactor_factored_attn_matrices: rotate each head's basis to its singular vectors.
            hf_model: a loaded `transformers` model to take the weights from, or a `PeftModel`, which is merged. It is
                enough by itself: then the network is not asked. A name beside it says where its tokenizer is, or the
                folder of an adapter for it.
            tokenizer: instead of the checkpoint's own; False loads the model without one.
            device, dtype: of the model's parameters; by default the CPU and the checkpoint's dtype, or what
                `hooked_lm.compat.install` sets in their place.
            revision: branch, tag or commit on the hub.
            checkpoint_index, checkpoint_value: a checkpoint from during training, by its number or training step, for
                families that publish them.
            first_n_layers: keep only the first so many blocks.
            n_ctx: a shorter context, in tokens.
            default_prepend_bos, default_padding_side: override the model's defaults.
            trust_remote_code: run code that comes with the checkpoint: of its tokenizer, and of its config where
                transformers does not know the model type. Without it such a checkpoint raises; nobody is asked.
            ignore_config_fields: fields of a HuggingFace config to read as if they were not there. A field that
                transformers defines or reads, with another value than its default, raises if no rule here handles it;
                this is for those that you know not to matter. `model.origin["ignore_config_fields"]` lists them.
            cache_dir, token, local_files_only: of downloads from the hub, as in `transformers`.
            move_to_device: False leaves the parameters on the CPU whatever `device` is.
            model_name, torch_dtype: second names of `name_or_path` and `dtype`.
            **without_effect: keywords of the classic library that cannot act (`n_devices`, `load_in_4bit` and others);
                one warning names those that ask for something.

        Raises:
            CheckpointError: the checkpoint cannot be found or read; the message lists the places searched.
            TypeError: no name and no model, one thing under two names, or a keyword that nothing knows.
        """
        keywords.check_without_effect(without_effect, inspect.signature(cls.from_pretrained).parameters)
        keywords.check_same("name_or_path", name_or_path, "model_name", model_name)
        keywords.check_same("dtype", dtype, "torch_dtype", torch_dtype)
        name_or_path = model_name if name_or_path is None else name_or_path
        loaded = checkpoint.load(
            bundled.find(str(name_or_path)) or name_or_path,
            hf_model=hf_model,
            tokenizer=tokenizer,
            revision=revision,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value,
            first_n_layers=first_n_layers,
            n_ctx=n_ctx,
            dtype=dtype or torch_dtype or defaults().dtype,
            trust_remote_code=trust_remote_code,
            ignore_config_fields=ignore_config_fields,
            hub=Hub(cache_dir, token, local_files_only),
        )
        changes = {"default_prepend_bos": default_prepend_bos, "default_padding_side": default_padding_side}
        cfg = loaded.cfg.replace(
            init_weights=False, device=None, **{name: value for name, value in changes.items() if value is not None}
        )
        steps = (fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices)
        asked = dict(zip(processing.STEPS, steps, strict=True))
        name = cfg.model_name if name_or_path is None else str(name_or_path)
        plan = _planned(name, cfg, asked, loaded.processed)
        place = device or defaults().device() or "cpu"
        return cls._of_checkpoint(name, cfg, loaded, plan, place if move_to_device else "cpu")

    @classmethod
    @torch.no_grad()
    def _of_checkpoint(
        cls,
        name: str,
        cfg: HookedTransformerConfig,
        loaded: checkpoint.Loaded,
        plan: list[str],
        device: str | torch.device,
    ) -> Self:
        """Build a model for a checkpoint and load its weights, chunk by chunk.

        Names and shapes are checked on the meta device first, before any memory is allocated.
        """
        _check_steps(name, loaded.processed)
        untied_by_processing = processing.unties(cfg, plan)
        before = cfg.replace(tie_word_embeddings=cfg.tie_word_embeddings and not untied_by_processing)
        shapes = {key: torch.empty(shape, device="meta") for key, shape in loaded.weights.shapes.items()}
        with torch.device("meta"):
            model = cls(cfg, move_to_device=False)
        # Before processing: a fold would drop a missing norm gain without an error.
        _check_shapes(name, shapes, model.own_tensors())
        if plan:
            if untied_by_processing:
                shapes["unembed.W_U"] = shapes["embed.W_E"].T
            with torch.device("meta"):
                after = processing.process_(before, shapes, plan)
                model = cls(after, move_to_device=False)
        if loaded.tokenizer is not None:
            model.tokenizer = loaded.tokenizer
        placement = cls._placement(model, device)
        for chunk in loaded.weights:
            if untied_by_processing and "embed.W_E" in chunk:
                chunk["unembed.W_U"] = chunk["embed.W_E"].T
            if not placement.load_chunk(chunk, before, plan, keep_views=loaded.weights.mapped) or plan:
                # No parameter is a view of the mapped file, so its pages can be released.
                loaded.weights.release()
        model.cfg.set_unlocked(device=str(torch.device(device)))
        model.processed, model.origin = (*loaded.processed, *plan), loaded.origin
        return model

    @classmethod
    def _placement(cls, model: nn.Module, device: str | torch.device) -> ParameterPlacement:
        """What puts loaded tensors into a model's parameters."""
        return ParameterPlacement(model, device)

    # Any: the keyword arguments are those of from_pretrained, each of its own type.
    @classmethod
    def from_pretrained_no_processing(cls, name_or_path: str | Path | None = None, **kwargs: Any) -> Self:
        """Return a model with its weights as trained, whose logits equal HuggingFace's.

        Args:
            name_or_path, **kwargs: as for `from_pretrained`.

        Raises:
            CheckpointError: as `from_pretrained`.
        """
        off = dict.fromkeys(processing.STEPS, False)
        return cls.from_pretrained(name_or_path, **{**off, **kwargs})

    @staticmethod
    def _load_tokenizer(name: str) -> Tokenizer:
        return checkpoint.load_tokenizer(name)

    # State dicts

    # Any: torch has no public name for the type that its own load_state_dict returns.
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy weights into the model and return the missing and unexpected names.

        A state dict of the classic library is accepted too: see `weights.from_classic`. A `W_U` that is not the
        transpose of a tied embedding unties the two.

        Args:
            state_dict: tensors by their names.
            strict: require every weight, and no other.
            assign: only False.

        Raises:
            RuntimeError: a key is missing or surplus, or a tensor has the wrong shape.
            ValueError: `assign`, which would lose the memory layout that the projections need; or integers, float8 or
                complex numbers in place of floats.
        """
        if assign:
            raise ValueError(
                "load_state_dict copies the weights into the model's own memory layout: leave assign=False"
            )
        weights = from_classic(dict(state_dict))
        if self.cfg.positional_embedding_type not in ("standard", "shortformer"):
            # The classic library keeps learned positions in ALiBi models too, without reading them.
            weights.pop("pos_embed.W_pos", None)
        _check_floats(weights, dict(self.named_parameters(remove_duplicate=False)))
        result = super().load_state_dict(weights, strict=strict)
        self.processed = ()
        return result

    def load_and_process_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        refactor_factored_attn_matrices: bool | None = None,
    ) -> None:
        """Copy unprocessed weights into the model and process them.

        Args:
            state_dict: of a model of the same config, unprocessed; with the norms' gains and biases too where the
                config has norms without (`LNPre`, `RMSPre`), into whose weights they are folded then. What it lacks
                is filled in as by `fill_missing_keys`.
            fold_ln, center_writing_weights, center_unembed, fold_value_biases, refactor_factored_attn_matrices: as for
                `process_weights_`.

        Raises:
            RuntimeError: as `load_state_dict`.
            ValueError: the state dict has gains, the config's norms have none, and `fold_ln` is False; or it lacks a
                matrix of attention or of an MLP.
        """
        weights = self.fill_missing_keys(state_dict)
        kind = self.cfg.normalization_type or ""
        own = dict(self.named_parameters())
        unfolded = kind.endswith("Pre") and any(folded_away(name) for name in weights.keys() - own.keys())
        if unfolded:
            if fold_ln is False:
                raise ValueError(
                    f"the state dict has gains of norms, and this config's norms ({kind}) have none: they are folded "
                    "into the weights, unless the model is built with normalization_type="
                    f"{kind.removesuffix('Pre')!r}"
                )
            _, weights = processing.process(self.cfg.replace(normalization_type=kind[:-3]), weights, ["fold_ln"])
        self.load_state_dict(weights)
        self.processed = ("fold_ln",) if unfolded else ()
        self.process_weights_(
            fold_ln, center_writing_weights, center_unembed, refactor_factored_attn_matrices, fold_value_biases
        )


def _mismatch(name: str) -> str:
    return f"{name} does not hold the tensors that its config implies"


def _planned(
    name: str, cfg: HookedTransformerConfig, asked: dict[str, bool | None], done: tuple[str, ...]
) -> list[str]:
    """Return the processing steps that are still to be done; warn of one that was done and should not have been."""
    undone = [step for step in done if asked.get(step) is False]
    if undone:
        warnings.warn(f"{', '.join(undone)} was applied to the weights in {name} and cannot be undone", stacklevel=3)
    return [step for step in processing.plan_processing(cfg, asked) if step not in done]


def _check_steps(name: str, processed: tuple[str, ...]) -> None:
    unknown = [step for step in processed if step not in processing.STEPS]
    if unknown:
        raise checkpoint.CheckpointError(
            f"{name}: config.json has processed={list(processed)}, but {unknown} are no processing steps"
        )


def _check_floats(given: Weights, parameters: Mapping[str, Tensor]) -> None:
    """Check that no integers or other numbers stand for floats, as which torch would copy them."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, value in given.items():
        if name in parameters and isinstance(value, Tensor) and value.dtype not in floats:
            raise ValueError(
                f"{name} has the dtype {value.dtype}, and a weight has one of {', '.join(map(str, floats))}: such "
                "numbers belong to a quantised model. Convert them to floats first, with the scales of its quantisation"
            )


def _check_shapes(name: str, given: Weights, expected: Mapping[str, Tensor]) -> None:
    faults = [f"{key} is missing" for key in expected if key not in given]
    faults += [f"{key} has no place" for key in given if key not in expected]
    faults += [
        f"{key} has shape {tuple(given[key].shape)} instead of {tuple(parameter.shape)}"
        for key, parameter in expected.items()
        if key in given and given[key].shape != parameter.shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise checkpoint.CheckpointError(f"{_mismatch(name)}: {'; '.join(faults[:8])}{more}")
