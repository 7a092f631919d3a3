"""`nnsight` around the model of `transformers`: what is read and edited is written in the body of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnsight import TransformersModel  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.peers.contestant import serve_contestant
from benchmarks.peers.plain_transformers import Plain, Visit


class Traced(Plain):
    """A model of `transformers` in the hands of `nnsight`."""

    libraries = ("nnsight",)

    def load_model(self, folder: Path, way: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder / "tokenizer"),  # else it is looked for on the hub
            trust_remote_code=False,
        )
        return TransformersModel(
            str(folder / "huggingface"), task="text-generation", tokenizer=tokenizer, dispatch=True
        )

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        with model.trace(tokens, use_cache=False):
            logits = model.output.logits.save()
        return logits

    def run_through(self, tokens: Tensor, visits: Sequence[Visit]) -> Tensor:
        with self.model.trace(tokens, use_cache=False):
            for module, where, edit in visits:
                changed = edit(getattr(module, where))
                if changed is not None:
                    setattr(module, where, changed)
            logits = self.model.output.logits.save()
        return logits

    def generated(self, tokens: Tensor, **options: Any) -> Tensor:
        with self.model.generate(tokens, **options) as tracer:
            generated = tracer.result.save()
        return generated


if __name__ == "__main__":
    serve_contestant(Traced())
