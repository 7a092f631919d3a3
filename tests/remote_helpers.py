"""A server of a small model, in this process or at a socket, and what its tests send."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hooked_lm import HookedTransformer, metrics
from hooked_lm.remote.app import make_app
from hooked_lm.remote.limits import Limits
from hooked_lm.remote.service import Service
from hooked_lm.remote.source import ModelSource
from hooked_lm.remote.tokens import UserTable
from hooked_lm.tracing import Trace
from hooked_lm.tracing.wire import to_bytes
from tests.helpers import tiny_model
from tests.serving import at_socket

SCOPES = {"ann": ["trace", "gradient", "weight"], "bob": ["trace"], "eve": []}


def token_of(user: str) -> str:
    return f"{user}s-token"


def users_table(folder: Path) -> UserTable:
    """The users of `SCOPES`, by a file of tokens."""
    entries = [
        {"user": name, "sha256": hashlib.sha256(token_of(name).encode()).hexdigest(), "scopes": scopes}
        for name, scopes in SCOPES.items()
    ]
    path = folder / "tokens.json"
    path.write_text(json.dumps({"tokens": entries}))
    return UserTable.read(path)


def saved_model(folder: Path, **changes: Any) -> HookedTransformer:
    """A small model, saved to a folder as a server reads it."""
    model = tiny_model(**{"n_layers": 4, "dtype": torch.float32, **changes})
    model.save_pretrained(folder)
    # As the server has it: its weights are in the order of the file.
    return HookedTransformer.from_pretrained(folder, tokenizer=False)


@contextmanager
def service_of(folder: Path, users: UserTable | None = None, replicas: int = 1, **limits: Any) -> Generator[Service]:
    service = Service({"tiny": ModelSource(str(folder))}, users, Limits(**limits), replicas)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def listening(service: Service, heartbeat: float = 10.0) -> Generator[str]:
    """A service at a socket of this machine; the address."""
    with at_socket(make_app(service, heartbeat)) as address:
        yield address


def small_trace(model: Any, number: int = 0) -> Trace:
    """A trace that saves a score of its own for each number."""
    trace: Trace = model.trace(run=False)
    run = trace.prompts([[1 + number % 19, 2, 3], [4, 5, 6 + number % 7, number // 133 % 20]])
    run["resid_post", 1].at(pos=-1).scale(1 + number / 100)
    run.metric(metrics.log_prob(3)).save("score")
    return trace


def body_of(model: HookedTransformer, number: int = 0) -> bytes:
    trace = small_trace(model, number)
    return to_bytes(trace.graph, trace.target)
