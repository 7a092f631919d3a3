"""The processes of a served model that is shared out: the first takes jobs, the others run the same ones.

Jobs go to the others through the store of the group. A lost or silent process is an error in all of them within the
group's timeout; they end then, and whoever started them starts the group again.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from hooked_lm import parallel
from hooked_lm._support.plain_data import PlainData
from hooked_lm.remote.protocol import packed, unpacked
from hooked_lm.remote.source import ModelSource
from hooked_lm.transformer import HookedTransformer
from hooked_lm.weights import STEPS

__all__ = ["Followers", "Member", "end_with_parent", "launched"]

_FOR_EVER = datetime.timedelta(days=365)


def launched() -> int:
    """Return how many processes `torch.distributed.run` has started, of which this is one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Member:
    """One of the processes.

    Args:
        source: of the model.
        rank: of this process.
        store: a file that all processes of this machine see; None for the store of `torch.distributed.run`.

    Attributes:
        model: this process's part.
    """

    def __init__(self, source: ModelSource, rank: int, store: str | None) -> None:
        self.rank, self._sent = rank, 0
        self.followers: Followers | None = None  # kept while this process lives
        self._store = _launchers_store(source.ranks) if store is None else FileStore(store, source.ranks)
        device = torch.device(source.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", self._store),
            rank=rank,
            world_size=source.ranks,
            timeout=datetime.timedelta(seconds=source.rank_timeout),
        )
        options: PlainData = {} if source.processing else dict.fromkeys(STEPS, False)
        self.model: HookedTransformer = parallel.load(
            source.name, device=device, revision=source.revision, dtype=source.dtype, **options
        )

    def send(self, head: PlainData, body: bytes) -> None:
        """Give a job to the other processes."""
        self._store.set(f"job {self._sent}", packed(head, body))  # type: ignore[arg-type]
        if self._sent:
            self._store.delete_key(f"job {self._sent - 1}")
        self._sent += 1

    def receive(self) -> tuple[PlainData, bytes]:
        """Return the next job of the first process, once there is one."""
        key = f"job {self._sent}"
        self._store.wait([key], _FOR_EVER)
        self._sent += 1
        return unpacked(bytes(self._store.get(key)))

    def agreed(self, stop: bool) -> bool:
        """Return whether the first process wants to stop: all of them have to, at one place."""
        flag = torch.tensor([int(stop)], device=self.model.embed.W_E.device)
        dist.broadcast(flag, 0)
        return bool(flag.item())


def _launchers_store(size: int) -> Store:
    environ = os.environ
    store = TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        size,
        is_master=environ["RANK"] == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )
    return PrefixStore(f"serve {environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Followers:
    """The other processes on this machine, which end with this one.

    Args:
        source: of the model.
    """

    def __init__(self, source: ModelSource) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hooked_lm_group_")
        self.store = str(Path(self._folder.name) / "store")
        command = [sys.executable, "-m", "hooked_lm.remote.follower", json.dumps(asdict(source)), self.store]
        # A pipe that nothing is written to: its end tells them that this process has ended, however it did.
        self.processes = [
            subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE) for rank in range(1, source.ranks)
        ]


def end_with_parent() -> None:
    """End this process when what has started it ends."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
