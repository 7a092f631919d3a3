"""A served model whose heads are shared out among processes: its numbers, and the loss of one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hooked_lm
from hooked_lm.remote import RemoteError
from hooked_lm.remote.service import Service
from hooked_lm.remote.source import ModelSource
from tests.remote_helpers import listening, saved_model, small_trace


def followers(worker: int) -> list[int]:
    """The processes that a worker has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if _is(process, b"hooked_lm.remote.follower") and f"PPid:\t{worker}\n" in (process / "status").read_text():
            found.append(int(process.name))
    return found


def test_a_group_serves_and_is_started_again_when_one_of_it_is_lost(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", n_heads=4, d_head=4)
    source = ModelSource(str(tmp_path / "model"), ranks=2, rank_timeout=20.0)
    service = Service({"tiny": source})
    try:
        with listening(service) as url:
            there = hooked_lm.connect(url).model("tiny")
            assert there.manifest["weights"]["blocks.0.attn.W_Q"] == [4, 12, 4]
            replica = service.models["tiny"].replicas[0]
            (other,) = followers(int(replica.process.pid or 0))
            expected = small_trace(model, 1).run()["score"]
            torch.testing.assert_close(small_trace(there, 1).run()["score"], expected, rtol=1e-5, atol=1e-6)
            # What does not fit is an error in both, and both go on.
            trace = there.trace(run=False, verbose=False)
            logits = trace.prompts([[1, 2]])["logits"].at(pos=-1)
            logits.gather(trace.constant(torch.full((1, 1), 77)), axis=-1).save("x")
            with pytest.raises(hooked_lm.tracing.TraceError, match="failed"):
                trace.run()
            os.kill(other, signal.SIGKILL)
            expected = small_trace(model, 2).run()["score"]
            torch.testing.assert_close(small_trace(there, 2).run()["score"], expected, rtol=1e-5, atol=1e-6)
            assert "hooked_lm_workers_lost_total 1" in service.metrics()
            (again,) = followers(int(replica.process.pid or 0))
            assert again != other
    finally:
        service.close()
    for _ in range(100):
        if not Path(f"/proc/{again}").exists() or "Z" in Path(f"/proc/{again}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the other process outlives its group")


@pytest.mark.skipif("HOOKED_LM_RANKS" not in os.environ, reason="HOOKED_LM_RANKS is not set: it takes a minute")
def test_processes_of_torch_distributed_run_serve_together(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", n_heads=4, d_head=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    served = ["-m", "hooked_lm.cli", "serve", f"tiny={tmp_path / 'model'}", "--port", str(port)]
    process = subprocess.Popen([*command, *served], stderr=subprocess.DEVNULL)
    try:
        there = hooked_lm.connect(f"http://127.0.0.1:{port}", patience=90).model("tiny")
        for number in (1, 2):
            expected = small_trace(model, number).run()["score"]
            torch.testing.assert_close(small_trace(there, number).run()["score"], expected, rtol=1e-5, atol=1e-6)
            for pid in Path("/proc").glob("[0-9]*"):
                ours = number == 1 and _is(pid, b"hooked_lm.cli", str(port).encode()) and _is_rank_1(pid)
                if ours:
                    os.kill(int(pid.name), signal.SIGKILL)
                    time.sleep(1)
    except RemoteError as error:
        raise AssertionError(str(error)) from error
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _is(pid: Path, *words: bytes) -> bool:
    try:
        return all(word in (pid / "cmdline").read_bytes() for word in words)
    except OSError:
        return False


def _is_rank_1(pid: Path) -> bool:
    try:
        return b"\0RANK=1\0" in b"\0" + (pid / "environ").read_bytes() + b"\0"
    except OSError:
        return False
