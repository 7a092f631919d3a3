"""Our side of the pipe: a peer's process, which is started once and then asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

# A peer's name, as it is given on the command line -> the module here that speaks for it.
PEERS = {
    "transformer_lens-3": "benchmarks.peers.hooked_transformer",
    "transformer_lens-4": "benchmarks.peers.transformer_bridge",
    "nnsight": "benchmarks.peers.nnsight_tracing",
}
# Contestants that need no environment of their own.
OWN = {
    "ours": "benchmarks.peers.ours",
    "transformers": "benchmarks.peers.plain_transformers",
    "minimal": "benchmarks.peers.minimal",
}
_ROOT = Path(__file__).parents[2]


class Asked(Protocol):
    """Somebody who can be asked to do things."""

    @property
    def name(self) -> str: ...

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the answer to a request."""


@dataclass(frozen=True)
class Peer:
    """A running peer. It computes while it is asked, and sleeps otherwise.

    Attributes:
        name: one of `PEERS` or `OWN`.
        requests: what it reads.
        replies: what it answers.
        complaints: whatever it prints besides, in a file.
    """

    name: str
    requests: IO[str]
    replies: IO[str]
    complaints: IO[str]

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the peer's answer.

        Raises:
            RuntimeError: the request failed over there, or the process has died; with its own words.
        """
        try:
            print(json.dumps({"do": what, "arguments": arguments}), file=self.requests, flush=True)
            line = self.replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.complaints.seek(0)
            raise RuntimeError(f"{self.name} died when asked to {what}:\n{self.complaints.read()[-2000:]}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.name} could not {what}:\n{reply['error']}")
        return reply["result"]


def interpreter_of(option: str) -> tuple[str, str]:
    """Read `NAME=PYTHON`: a peer and its environment's interpreter.

    Raises:
        ValueError: there is no such peer, or no such file.
    """
    name, _, python = option.partition("=")
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}: there are {', '.join(PEERS)}, each given as NAME=PYTHON")
    if not Path(python).is_file():
        raise ValueError(
            f"{name} needs its environment's interpreter, and {python!r} is no file: "
            f"give --peer {name}=FOLDER/bin/python, FOLDER being a virtual environment that it is installed in"
        )
    # Not resolved: an environment's interpreter is a link, and known by where the link is.
    return name, str(Path(python).absolute())


@contextmanager
def start_peer(name: str, python: str = sys.executable) -> Iterator[Peer]:
    """Start a peer, and end it afterwards.

    Args:
        name: one of `PEERS` or `OWN`.
        python: the interpreter of the environment that it is installed in.
    """
    # No progress bars, and no looking around on the network.
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        process = subprocess.Popen(
            [python, "-m", (PEERS | OWN)[name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            cwd=_ROOT,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Peer(name, process.stdin, process.stdout, complaints)
        finally:
            process.kill()
            process.communicate()
