"""`transformer_lens` 3: `HookedTransformer`, with weights in the classic names."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig  # type: ignore[import-not-found]

from benchmarks.peers.classic_patching import serve_patching


def load_model(folder: Path) -> HookedTransformer:
    """Return the model with the weights as they are: nothing folded, nothing centred."""
    fields = json.loads((folder / "classic.json").read_text())
    model = HookedTransformer(HookedTransformerConfig(**fields, init_weights=False, device="cpu"))
    missing, unexpected = model.load_state_dict(load_file(folder / "classic.safetensors"), strict=False)
    # Masks are in its state too, and have been made already.
    forgotten = set(missing) & {name for name, _ in model.named_parameters()}
    if forgotten or unexpected:
        raise ValueError(f"weights not given: {sorted(forgotten)}; not known: {unexpected}")
    return model.eval()


if __name__ == "__main__":
    serve_patching(load_model)
