"""Where a model's weights go to: a folder in our own format, or in HuggingFace's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hooked_lm._support.plain_data import PlainData
from hooked_lm.weights.loading import WeightLoading
from weight_conversion.export import export
from weight_conversion.own_format import CONFIG_DIGEST, OWN_FORMAT, OWN_VERSION, config_digest, digest_header

__all__ = ["WeightSaving"]


class WeightSaving(WeightLoading):
    """The saving methods of `HookedTransformer`."""

    # Folders

    @torch.no_grad()
    def to_huggingface(self, folder: str | Path) -> None:
        """Write the model in HuggingFace's format, so that `transformers` loads it and computes the same logits.

        For models that were loaded from HuggingFace's format without processing. Weights changed since, by training for
        example, are written as they are now. Biases that the family has no tensors for are folded into other weights
        where that is exact; otherwise they are left out, and a warning names them.

        Args:
            folder: where to write; created if missing.

        Raises:
            ValueError: the model has been processed, or was never a HuggingFace model.
            CheckpointError: it was loaded in part, or has weights that its family's format lacks.
        """
        if self.origin is None:
            raise ValueError(
                "this model was not loaded from a HuggingFace checkpoint, so there is no family to write it as"
            )
        if self.processed:
            raise ValueError(
                f"the weights have been processed ({', '.join(self.processed)}), which HuggingFace's format cannot "
                "express: load the model with from_pretrained_no_processing"
            )
        export(self.cfg, self.own_tensors(), self.origin, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder: `config.json`, `model.safetensors` and the tokenizer, if it has one.

        `from_pretrained(folder)` gives the same weights, bit for bit; processing steps are not applied twice. A save
        that is cut off leaves the folder as it was, or without a `config.json`, so that it does not load.

        Args:
            folder: where to write; created if missing.
        """
        folder = Path(folder)
        config = self.cfg.to_dict()
        # The device is no property of the saved model.
        del config["device"]
        config["tokenizer_name"] = None
        saved: PlainData = {
            "format": OWN_FORMAT,
            "version": OWN_VERSION,
            "processed": list(self.processed),
            "config": config,
            "origin": self.origin,
        }
        saved[CONFIG_DIGEST] = config_digest(saved)
        tensors = {name: value.contiguous() for name, value in self.own_tensors().items()}
        text = json.dumps(saved, indent=2) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        described, written = folder / "config.json.new", folder / "model.safetensors.new"
        described.write_text(text, encoding="utf-8")
        save_file(tensors, written, digest_header(saved[CONFIG_DIGEST]))
        # safetensors creates the file readable by its owner only.
        written.chmod(described.stat().st_mode & 0o777)
        # The folder is no model's while it holds parts of two: config.json goes first and comes last.
        (folder / "config.json").unlink(missing_ok=True)
        # Parameters may be views of the file that is replaced. Renaming keeps the old file's memory map valid.
        written.replace(folder / "model.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        described.replace(folder / "config.json")
