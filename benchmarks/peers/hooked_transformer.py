"""`transformer_lens` 3: `HookedTransformer`."""

from __future__ import annotations

import json
import warnings
from contextlib import chdir
from pathlib import Path

from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig  # type: ignore[import-not-found]

from benchmarks.peers.classic_patching import TransformerLens, tokenizer_in
from benchmarks.peers.contestant import serve_contestant


class Hooked(TransformerLens):
    """A model of the classic library."""

    def load_model(self, folder: Path, way: str) -> HookedTransformer:
        # It loads what goes by a name that it knows; a folder of that name in the working directory will do.
        if (folder / "gpt2").exists():
            load = HookedTransformer.from_pretrained
            if way == "unprocessed":
                load = HookedTransformer.from_pretrained_no_processing
            tokenizer = tokenizer_in(folder)
            with chdir(folder), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return load("gpt2", tokenizer=tokenizer, device="cpu").eval()
        if way != "unprocessed":
            raise ValueError(f"{folder}: weights in the classic names are taken as they are")
        return from_classic_names(folder)


def from_classic_names(folder: Path) -> HookedTransformer:
    """Return a model with weights in the classic names."""
    fields = json.loads((folder / "classic.json").read_text())
    model = HookedTransformer(HookedTransformerConfig(**fields, init_weights=False, device="cpu"))
    weights = load_file(folder / "classic.safetensors")
    # A gate has no bias there.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("b_gate") or weight.any()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Masks are in its state too, and have been made already.
    forgotten = set(missing) & {name for name, _ in model.named_parameters()}
    if forgotten or unexpected:
        raise ValueError(f"weights not given: {sorted(forgotten)}; not known: {unexpected}")
    return model.eval()


if __name__ == "__main__":
    serve_contestant(Hooked())
