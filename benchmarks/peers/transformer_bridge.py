"""`transformer_lens` 4: `TransformerBridge` around the model of `transformers`, which is how it starts by default."""

from __future__ import annotations

from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

from benchmarks.peers.classic_patching import TransformerLens, tokenizer_in
from benchmarks.peers.contestant import serve_contestant


class Bridge(TransformerLens):
    """A bridge to a model of `transformers`."""

    def load_model(self, folder: Path, way: str) -> TransformerBridge:
        bridge = TransformerBridge.boot_transformers(
            str(folder / "huggingface"), device="cpu", tokenizer=tokenizer_in(folder)
        )
        if way == "processed":
            bridge.enable_compatibility_mode()
        return bridge.eval()


if __name__ == "__main__":
    serve_contestant(Bridge())
