"""Many clients at once, workers that are killed meanwhile, and requests that mean harm.

A share of each runs with the suite; `HOOKED_LM_LOAD=1` runs them whole: 32 clients with 20 traces each, 5,000 requests.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import hooked_lm
from hooked_lm import HookedTransformer, metrics
from hooked_lm.remote import RemoteError
from hooked_lm.remote.service import Service
from hooked_lm.tracing.wire import to_bytes
from tests.remote_helpers import body_of, listening, service_of, small_trace, token_of, users_table

WHOLE = bool(os.environ.get("HOOKED_LM_LOAD"))
CLIENTS, TRACES, KILLS, REQUESTS, STREAMS = (32, 20, 5, 5000, 40) if WHOLE else (8, 6, 1, 300, 2)


@pytest.mark.parametrize("kills", [0, KILLS])
def test_no_trace_is_lost_doubled_or_mixed_up(folder: Path, model: HookedTransformer, kills: int) -> None:
    wanted = {number: small_trace(model, number).run()["score"] for number in range(CLIENTS * TRACES)}
    found: dict[int, torch.Tensor] = {}
    failed: dict[int, RemoteError] = {}
    with service_of(folder / "model", queued=CLIENTS) as service, listening(service) as url:

        def client(first: int) -> None:
            there = hooked_lm.connect(url, timeout=30).model("tiny")
            for number in range(first, first + TRACES):
                try:
                    found[number] = small_trace(there, number).run()["score"]
                except RemoteError as error:
                    failed[number] = error

        threads = [threading.Thread(target=client, args=(one * TRACES,)) for one in range(CLIENTS)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        killed = sum(_kill(service, threads) for _ in range(kills))
        for thread in threads:
            thread.join(300)
        seconds = time.monotonic() - begun
        text = service.metrics()
    assert not any(thread.is_alive() for thread in threads)
    assert set(found) | set(failed) == set(wanted)
    assert all(torch.equal(found[number], wanted[number]) for number in found)
    # Each client has its numbers, or one clear error where the workers of two attempts were killed.
    assert all((error.status, error.kind) == (502, "worker lost") for error in failed.values())
    assert len(failed) <= killed // 2
    assert f"hooked_lm_jobs_queued_total {CLIENTS * TRACES}\n" in text
    report(f"{len(wanted)} traces of {CLIENTS} clients, {killed} workers killed", seconds, f"{len(failed)} errors")


def report(what: str, seconds: float, found: object) -> None:
    """Tell what a whole run measured."""
    sys.stdout.write(f"\n{what}: {seconds:.1f} s, {found}\n")


def _kill(service: Service, threads: list[threading.Thread]) -> bool:
    """Kill the worker while it runs a job; whether there was one."""
    replica = service.models["tiny"].replicas[0]
    while any(thread.is_alive() for thread in threads):
        pid = replica.process.pid
        if replica.state == "running":
            os.kill(int(pid or 0), signal.SIGKILL)
            while replica.process.pid == pid or replica.state == "loading":
                time.sleep(0.01)
            return True
        time.sleep(0.001)
    return False


# Harm


class Server(NamedTuple):
    port: int
    pid: int


@contextmanager
def serving(folder: Path) -> Generator[Server]:
    """`hooked-lm serve` in a process of its own, so that its memory can be measured."""
    users_table(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hooked_lm.cli", "serve", f"tiny={folder / 'model'}", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--tokens", str(folder / "tokens.json")], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("Serving"):
            break
    else:
        raise AssertionError("".join(lines))
    log = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(log), daemon=True)
    reader.start()
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)
    try:
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        reader.join(5)
        log.close()
        assert not any("Traceback" in line or '"fault"' in line for line in lines), "".join(lines)


def memory(pid: int, field: str) -> float:
    """MiB of a process: `VmRSS` now, `VmHWM` at most."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) / 1024


def harms(model: HookedTransformer, chance: random.Random) -> list[Callable[[int], tuple[int, bytes] | None]]:
    """Requests that no server is to take, each as a function of the port that returns status and answer."""
    good = body_of(model)
    length = int.from_bytes(good[:8], "little")
    document = json.loads(good[8 : 8 + length])
    tensors = good[8 + length :]
    jobs = "/v1/models/tiny/jobs"

    def post(
        body: bytes | Iterator[bytes], user: str = "ann", path: str = jobs, **headers: str
    ) -> Callable[[int], tuple[int, bytes] | None]:
        def send(port: int) -> tuple[int, bytes] | None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                given = {"Authorization": f"Bearer {token_of(user)}", **headers}
                connection.request("POST", path, body=body, headers=given)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return None  # the server closed the connection
            finally:
                connection.close()

        return send

    def framed(changes: dict[str, object] | None = None, text: bytes | None = None) -> bytes:
        text = json.dumps({**document, **(changes or {})}).encode() if text is None else text
        return len(text).to_bytes(8, "little") + text + tensors

    def node(**changes: object) -> bytes:
        nodes = json.loads(json.dumps(document["nodes"]))
        nodes[chance.randrange(len(nodes))].update(changes)
        return framed({"nodes": nodes})

    def raw(content: bytes) -> Callable[[int], tuple[int, bytes] | None]:
        def send(port: int) -> tuple[int, bytes] | None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                link.sendall(content)
                link.shutdown(socket.SHUT_WR)
                answer = link.recv(2**16)
                words = answer.split()
                return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 400), answer
            return None

        return send

    with model.trace(run=False) as weight:
        weight.weight("unembed.W_U").sum().save("w")
    with model.trace(run=False) as huge:
        huge.randn(2**21, 2**21, seed=0).sum().save("x")
    with model.trace(run=False) as wide:
        wide.randn(2**13, 2**13, seed=0).save("x")
    secret = {"kind": "op", "name": "__import__", "operands": [], "params": {"name": "os"}}
    flips = bytearray(good)
    flips[chance.randrange(8)] ^= 1 << chance.randrange(8)
    return [
        post(good[: chance.randrange(len(good) - 1)]),
        post(bytes(flips)),
        post(chance.randbytes(chance.randrange(2000))),
        post(framed(text=b"[" * chance.randrange(40, 2**20))),
        post(framed(text=b'{"a":' * 5000 + b"1" + b"}" * 5000)),
        post(framed(text=b"9" * 4000)),
        post(framed(text=b'{"format": NaN}')),
        post((2**63).to_bytes(8, "little") + good[8:]),
        post(framed({"nodes": [secret]})),
        post(node(kind="eval")),
        post(node(site="../../etc/passwd")),
        post(node(operands=[-1])),
        post(framed({"runs": [{"tokens": [[10**30]]}]})),
        post(framed({"runs": [{"tokens": [[1] * 70_000]}]})),
        post(framed({"saves": {"x": 10**9}})),
        post(framed({"version": 99})),
        post(framed({"extra": 1})),
        post(framed()[: -len(tensors)] + b"\xff" * 8 + b"{}"),
        post(to_bytes(huge.graph, huge.target)),
        post(to_bytes(wide.graph, wide.target)),
        post(to_bytes(weight.graph, weight.target), user="bob"),
        post(good, user="eve"),
        post(good, user="nobody"),
        post(good, path="/v1/models/..%2F..%2Ftiny/jobs"),
        post(good, path="/v1/models/" + "x" * 3000 + "/jobs"),
        post(good, path="/v1/jobs/" + "0" * 64 + "/result"),
        post(b"", **{"Content-Length": str(2**40)}),
        post(good, **{"Hooked-LM-Protocol": "99"}),
        post(good, Authorization="Bearer " + "a" * 5000),
        raw(b"POST " + jobs.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\nhello"),
        raw(b"GET / HTTP/9.9\r\n\r\n"),
        raw(chance.randbytes(300)),
        raw(b"A" * 70_000),
    ]


def test_what_means_harm_starts_no_work_and_takes_no_memory(folder: Path, model: HookedTransformer) -> None:
    chance = random.Random(0)
    statuses: dict[int | None, int] = {}
    with serving(folder) as server:
        there = hooked_lm.connect(f"http://127.0.0.1:{server.port}", token_of("ann")).model("tiny")
        expected = small_trace(model).run()["score"]
        assert torch.equal(small_trace(there).run()["score"], expected)
        begun, start = time.monotonic(), memory(server.pid, "VmRSS")

        def stream() -> Iterator[bytes]:
            for _ in range(100):
                yield b"x" * 2**20

        def hundred_megabytes() -> None:
            for _ in range(STREAMS // 2):
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                with suppress(OSError, http.client.HTTPException):
                    headers = {"Authorization": f"Bearer {token_of('ann')}"}
                    connection.request("POST", "/v1/models/tiny/jobs", body=stream(), headers=headers)
                    statuses[connection.getresponse().status] = statuses.get(413, 0) + 1
                connection.close()

        streams = [threading.Thread(target=hundred_megabytes) for _ in range(2)]
        for one in streams:
            one.start()
        sent = 0
        while sent < REQUESTS:
            for harm in harms(model, chance):
                answer = harm(server.port)
                status = None if answer is None else answer[0]
                statuses[status] = statuses.get(status, 0) + 1
                assert status is None or 400 <= status < 500, (status, answer, harm.__closure__)
                sent += 1
        for one in streams:
            one.join(120)
        grown = memory(server.pid, "VmHWM") - start
        seconds = time.monotonic() - begun
        # None of them was queued, and the server still does what it should.
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        assert "hooked_lm_jobs_queued_total 1" in lines
        assert torch.equal(small_trace(there, 5).run()["score"], small_trace(model, 5).run()["score"])
    report(f"{sent} requests, {STREAMS} streams", seconds, f"{grown:.0f} MiB more at most, answers {statuses}")
    assert grown < 200


def test_the_experiment_of_the_talk_from_a_process_of_its_own(folder: Path, model: HookedTransformer) -> None:
    """The function-vector experiment: a client process without weights, and the bits that this process computes."""
    code = (
        "import sys, json, hooked_lm\n"
        "from tests.remote.test_load import talk\n"
        "there = hooked_lm.connect(sys.argv[1]).model('tiny')\n"
        "print(json.dumps({name: value.tolist() for name, value in talk(there).items()}))\n"
    )
    with service_of(folder / "model") as service, listening(service) as url:
        done = subprocess.run(
            [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=120, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    expected = talk(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.tensor(found[name], dtype=value.dtype), value), name


def talk(model: object) -> dict[str, torch.Tensor]:
    """A function vector from ten prompts, added to zero-shot prompts; the log-probabilities with and without."""
    generator = torch.Generator().manual_seed(0)
    shown = [torch.randint(0, 20, (6 + one % 5,), generator=generator).tolist() for one in range(10)]
    asked = [torch.randint(0, 20, (3 + one % 3,), generator=generator).tolist() for one in range(8)]
    with model.trace() as t:  # type: ignore[attr-defined]
        h = t.prompts(shown)["resid_post", 2].at(pos=-1).mean("batch")
        plain, steered = t.prompts(asked), t.prompts(asked)
        steered["resid_post", 2].at(pos=-1).add(h)
        for name, run in (("before", plain), ("after", steered)):
            run.metric(metrics.log_prob([one % 20 for one in range(8)])).save(name)
        h.save("h")
    return dict(t.results)
