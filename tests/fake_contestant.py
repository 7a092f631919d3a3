"""A contestant that misbehaves when it is asked to. Run by test_contestants.py in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.contestant import Contestant, serve_contestant


class Fake(Contestant):
    """Its model is a matrix."""

    def load_model(self, folder: Path, way: str) -> nn.Module:
        sys.stdout.write("loading, I say\n")
        return nn.Linear(2, 2)

    def logits(self, model: Any, tokens: Tensor) -> Tensor:
        return model(tokens.float())

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        return {"pid": os.getpid, "fail": self.fail, "die": self.die}

    def fail(self) -> None:
        raise ValueError("no such luck")

    def die(self) -> None:
        sys.stderr.write("my last words\n")
        sys.stderr.flush()
        os._exit(3)


if __name__ == "__main__":
    serve_contestant(Fake())
