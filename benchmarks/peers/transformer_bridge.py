"""`transformer_lens` 4: `TransformerBridge` around the model of `transformers`, which is how it starts by default."""

from __future__ import annotations

from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

from benchmarks.peers.classic_patching import serve_patching


def load_model(folder: Path) -> TransformerBridge:
    """Return the model with the weights as they are: compatibility mode would fold and centre them."""
    return TransformerBridge.boot_transformers(str(folder / "huggingface"), device="cpu").eval()


if __name__ == "__main__":
    serve_patching(load_model)
