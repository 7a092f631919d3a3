"""The client, at a socket: the bits of the local model, errors at the user's line, lost connections and workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hooked_lm
from hooked_lm import HookedTransformer, Intervention, metrics
from hooked_lm.remote import RemoteError, RemoteModel
from hooked_lm.remote.service import Service
from hooked_lm.sweep import sweep
from hooked_lm.tracing import TraceError
from hooked_lm.workers import Servers
from tests.helpers import tiny_model, tiny_tokens
from tests.remote_helpers import listening, service_of, small_trace, token_of, users_table

QUIET: dict[str, Any] = {"verbose": False}


@pytest.fixture(scope="module")
def service(model: HookedTransformer, folder: Path) -> Iterator[Service]:
    with service_of(folder / "model", queued=64) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service, heartbeat=0.3) as address:
        yield address


@pytest.fixture
def there(url: str) -> RemoteModel:
    return hooked_lm.connect(url, timeout=5, patience=10).model("tiny")


def experiment(model: Any) -> dict[str, torch.Tensor]:
    """Every kind of node, in several passes."""
    with model.trace(**({} if isinstance(model, HookedTransformer) else QUIET)) as t:
        source, target = t.prompts([[1, 2, 3], [4, 5, 6, 7]]), t.prompts(tiny_tokens(2, 5))
        state = source["resid_post", 3].at(pos=-1).mean("batch")
        target["resid_pre", 1].at(pos=-1).add(state * t.constant(torch.linspace(0, 1, 12)))
        target["z", 2].at(pos=0, head=1).scale(0.5)
        target["pattern", 3].at(pos=-1).save("pattern")
        score = target.metric(metrics.log_prob([3, 4]))
        score.save("score")
        t.gradient(score.sum(), of=[target["resid_pre", 0].at(pos=-1)])[0].save("gradient")
        t.logits_of(source["resid_post", 0].at(pos=-1)).save("lens")
        t.weight("unembed.W_U").sum().save("weight")
        t.randn(3, seed=1).save("noise")
        new = t.generate([[1, 2], [3]], max_new_tokens=4)
        new["resid_post", 1].at(pos=-1, step=slice(1, None)).add(1.0)
        new.generated.save("new")
        t.stack([patched(t, target, layer) for layer in range(4)]).save("grid")
    return dict(t.results)


def patched(t: Any, clean: Any, layer: int) -> Any:
    run = t.prompts(tiny_tokens(2, 5, seed=1))
    run["resid_post", layer].at(pos=-1).replace(clean["resid_post", layer].at(pos=-1))
    return run.metric(metrics.logit_diff(3, 4))


def test_a_trace_there_gives_the_bits_of_one_here(there: RemoteModel, model: HookedTransformer) -> None:
    found, expected = experiment(there), experiment(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


def test_what_is_known_of_a_model_there(there: RemoteModel, model: HookedTransformer, url: str) -> None:
    assert there.cfg.to_dict() == {**model.cfg.to_dict(), "device": None}
    assert there.hook_names == list(model.hook_dict)
    assert there.tokenizer is None
    assert repr(there) == f"RemoteModel('tiny' at '{url}')"
    trace, here = small_trace(there, 1), small_trace(model, 1)
    assert trace.hash == here.hash
    assert trace.estimate() == here.estimate()
    assert there.check(trace)["flops"] == here.estimate().flops


def line_of(error: pytest.ExceptionInfo[TraceError]) -> str:
    return str(error.value.line)


def test_an_error_names_the_line_here_whoever_finds_it(there: RemoteModel, service: Service) -> None:
    with pytest.raises(TraceError, match="unknown activation 'resid_psot'"), there.trace(**QUIET) as t:
        t.prompts([[1, 2]])["resid_psot", 1].save()
    with pytest.raises(TraceError, match="this server takes") as error, there.trace(**QUIET) as t:  # noqa: PT012
        t.prompts([[1, 2]])["resid_pre", 1].save("x")
        t.randn(2**20, 2**20, seed=0).sum().save("y")
    assert "test_client.py:" in line_of(error)
    source = Path(__file__).read_text().splitlines()
    assert "randn(2**20" in source[int(line_of(error).rpartition(":")[2]) - 1]
    # One that shows only when it is computed.
    with pytest.raises(TraceError, match="failed") as error, there.trace(**QUIET) as t:  # noqa: PT012
        logits = t.prompts([[1, 2]])["logits"].at(pos=-1)
        logits.gather(t.constant(torch.full((1, 1), 77)), axis=-1).save("x")
    assert "test_client.py:" in line_of(error)
    assert "gather" in source[int(line_of(error).rpartition(":")[2]) - 1]


def test_nan_in_a_saved_value_is_a_warning_that_names_the_line(there: RemoteModel) -> None:
    with there.trace(run=False, **QUIET) as t:
        (t.prompts([[1], [2]])["resid_pre", 0].sum("d_model").sum("pos") * 0.0 / 0.0).save("x")
    with pytest.warns(UserWarning, match=r"2 of the 2 entries of 'x' are NaN.*test_client\.py:\d+"):
        t.run()
    assert t["x"].isnan().all()


def test_what_is_refused_at_once(url: str, there: RemoteModel) -> None:
    with pytest.raises(RemoteError, match="no model 'huge'; this server has tiny") as error:
        hooked_lm.connect(url).model("huge")
    assert (error.value.status, error.value.kind) == (404, "unknown model")
    with pytest.raises(ValueError, match="an address such as http"):
        hooked_lm.connect("localhost:8000")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="is not reached"):
        hooked_lm.connect(nobody, patience=0.3)
    with there.trace(run=False) as t:
        t.prompts([[1, 2]]).metric(metrics.Metric("mine", -1, None, lambda logits: logits.sum(-1))).save("x")
    with pytest.raises(TraceError, match="function of this process"):
        t.run()


def test_tokens_and_their_scopes(folder: Path, model: HookedTransformer) -> None:
    with service_of(folder / "model", users_table(folder)) as service, listening(service) as url:
        with pytest.raises(RemoteError, match="needs a token"):
            hooked_lm.connect(url)
        with pytest.raises(RemoteError, match="needs a token"):
            hooked_lm.connect(url, "wrong")
        bob = hooked_lm.connect(url, token_of("bob")).model("tiny")
        assert torch.equal(small_trace(bob).run()["score"], small_trace(model).run()["score"])
        with pytest.raises(RemoteError, match="the scope 'weight'"), bob.trace(**QUIET) as t:
            t.weight("unembed.b_U").save("x")


def test_another_kind_of_server() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if "models" in self.path else 200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RemoteError, match="is it a hooked-lm server"):
            hooked_lm.connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


# Lost connections


class Proxy:
    """Passes bytes on between client and server, and cuts connections.

    Attributes:
        cut_after: bytes from the server after which the next connections are cut, one number for each.
        passed: bytes in both directions.
    """

    def __init__(self, url: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self.cut_after: list[int] = []
        self.passed = [0, 0]
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self.port))
            left = self.cut_after.pop(0) if self.cut_after else 10**9
            threading.Thread(target=self._pass, args=(client, server, 0, 10**9), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, 1, left), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: int, left: int) -> None:
        with suppress(OSError):
            while data := source.recv(2**14):
                sink.sendall(data[:left])
                self.passed[way] += len(data[:left])
                left -= len(data)
                if left <= 0:
                    break
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._listener.close()


@contextmanager
def proxied(url: str) -> Generator[Proxy]:
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.mark.parametrize("cut", [0, 1, 40, 150, 400])
def test_a_connection_that_is_cut_anywhere_loses_nothing(
    url: str, service: Service, model: HookedTransformer, cut: int
) -> None:
    with proxied(url) as proxy:
        there = hooked_lm.connect(proxy.url, timeout=5, patience=20).model("tiny")
        for first in range(4):  # the post, the events, the result
            proxy.cut_after = [10**9] * first + [cut] * 2
            trace = small_trace(there, 1000 + 10 * cut + first)
            queued = _counter(service, "jobs_queued_total")
            assert torch.equal(trace.run()["score"], small_trace(model, 1000 + 10 * cut + first).run()["score"])
            assert _counter(service, "jobs_queued_total") == queued + 1  # run once


def _counter(service: Service, name: str) -> float:
    for line in service.metrics().splitlines():
        if line.startswith(f"hooked_lm_{name} "):
            return float(line.split()[-1])
    return 0.0


def test_a_large_result_that_is_cut_goes_on_where_it_was(url: str, model: HookedTransformer) -> None:
    def large(model: Any) -> torch.Tensor:
        with model.trace(**({} if isinstance(model, HookedTransformer) else QUIET)) as t:
            t.randn(1000, 700, seed=3).save("x")
        found: torch.Tensor = t["x"]
        return found

    with proxied(url) as proxy:
        there = hooked_lm.connect(proxy.url, timeout=5, patience=20).model("tiny")
        proxy.cut_after = [10**9, 10**9, 1_500_000, 900_000]
        assert torch.equal(large(there), large(model))
        assert proxy.passed[1] < 4_000_000  # 2.8 MB, not twice


def test_without_streams_the_client_asks(there: RemoteModel, model: HookedTransformer, monkeypatch: Any) -> None:
    from hooked_lm.remote.transport import Disconnected, Transport

    def none(self: Transport, path: str, last: int) -> Iterator[Any]:
        raise Disconnected("no streams here")
        yield

    monkeypatch.setattr(Transport, "events", none)
    assert torch.equal(small_trace(there, 7).run()["score"], small_trace(model, 7).run()["score"])


def test_ctrl_c_cancels_the_job(there: RemoteModel, service: Service, monkeypatch: Any) -> None:
    from hooked_lm.remote.client import _Job

    def interrupted(self: Any, *args: object) -> None:
        raise KeyboardInterrupt

    process = service.models["tiny"].replicas[0].process
    os.kill(int(process.pid or 0), signal.SIGSTOP)
    try:
        small_trace(there, 800)
        threading.Thread(target=lambda: small_trace(there, 801).run(), daemon=True).start()
        time.sleep(0.3)
        monkeypatch.setattr(_Job, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_trace(there, 802).run()
    finally:
        os.kill(int(process.pid or 0), signal.SIGCONT)
    states = [job.state for job in service._jobs.values()]
    assert states[-1] == "cancelled"


# Lost workers


def test_a_job_whose_worker_is_killed_is_run_again_once(folder: Path, model: HookedTransformer) -> None:
    with service_of(folder / "model", queued=64) as service, listening(service) as url:
        there = hooked_lm.connect(url).model("tiny")
        replica = service.models["tiny"].replicas[0]

        def stop_and_kill(times: int) -> None:
            for _ in range(times):
                pid = int(replica.process.pid or 0)
                os.kill(pid, signal.SIGSTOP)
                while replica.state != "running":
                    time.sleep(0.002)
                os.kill(pid, signal.SIGKILL)
                while replica.process.pid == pid or replica.state == "loading":
                    time.sleep(0.0002)

        killer = threading.Thread(target=stop_and_kill, args=(1,))
        killer.start()
        time.sleep(0.1)
        assert torch.equal(small_trace(there, 1).run()["score"], small_trace(model, 1).run()["score"])
        killer.join()
        assert _counter(service, "workers_lost_total") == 1

        twice = threading.Thread(target=stop_and_kill, args=(2,))
        twice.start()
        time.sleep(0.1)
        with pytest.raises(RemoteError, match=r"worker lost at pass 1 layer \d+, and the job not run again") as error:
            small_trace(there, 2).run()
        assert error.value.status == 502
        twice.join()
        # The worker is there again, and so is the trace's chance.
        assert torch.equal(small_trace(there, 2).run()["score"], small_trace(model, 2).run()["score"])


def test_memory_that_runs_out_all_the_same_is_told_with_both_peaks(folder: Path, model: HookedTransformer) -> None:
    with service_of(folder / "model", memory=2**62, flops=1e30) as service, listening(service) as url:
        there = hooked_lm.connect(url).model("tiny")
        trace = there.trace(run=False, **QUIET)
        trace.randn(2**20, 2**20, seed=0).sum().save("x")
        with pytest.raises(RemoteError, match=r"memory ran out: .* were planned .* peak was [\d.e+]+ MiB") as error:
            trace.run()
        assert (error.value.status, error.value.kind) == (507, "memory")
        pid = service.models["tiny"].replicas[0].process.pid
        assert torch.equal(small_trace(there, 1).run()["score"], small_trace(model, 1).run()["score"])
        assert service.models["tiny"].replicas[0].process.pid == pid  # the worker lives


def test_a_job_that_hangs_is_ended_with_its_worker(folder: Path, monkeypatch: Any) -> None:
    from hooked_lm.remote import replicas

    monkeypatch.setattr(replicas, "_GRACE", 0.2)
    with service_of(folder / "model", seconds=0.3) as service, listening(service) as url:
        there = hooked_lm.connect(url).model("tiny")
        replica = service.models["tiny"].replicas[0]
        pid = int(replica.process.pid or 0)
        os.kill(pid, signal.SIGSTOP)  # as in a kernel that does not end
        with pytest.raises(RemoteError, match="too long") as error:
            small_trace(there, 1).run()
        assert error.value.status == 504
        assert small_trace(there, 2).run()["score"].shape == (2,)
        assert replica.process.pid != pid


def test_a_server_that_is_started_anew_gets_the_trace_again(folder: Path, model: HookedTransformer) -> None:
    with service_of(folder / "model") as service, listening(service) as url:
        there = hooked_lm.connect(url, timeout=5, patience=20).model("tiny")
        process = service.models["tiny"].replicas[0].process
        os.kill(int(process.pid or 0), signal.SIGSTOP)
        found: list[torch.Tensor] = []
        runner = threading.Thread(target=lambda: found.append(small_trace(there, 3).run()["score"]))
        runner.start()
        while not service._jobs:
            time.sleep(0.01)
        # As a new server, which knows of no job: the stream that is open ends.
        (job,) = service._jobs.values()
        service._jobs.clear()
        job.publish("failed", error={"status": 404, "kind": "unknown job", "message": "started anew"})
        os.kill(int(process.pid or 0), signal.SIGCONT)
        runner.join(20)
        assert torch.equal(found[0], small_trace(model, 3).run()["score"])
        assert _counter(service, "jobs_queued_total") == 2


def test_the_client_needs_no_server_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'httpx'): sys.modules[name] = None\n"
        "import hooked_lm\n"
        "try: hooked_lm.connect('http://127.0.0.1:9', patience=0.1)\n"
        "except ConnectionError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "is not reached" in done.stdout


def test_the_wire_of_an_experiment_is_small(url: str, model: HookedTransformer) -> None:
    """The function-vector experiment from another process: bytes over the wire, and the local bits."""
    with proxied(url) as proxy:
        there = hooked_lm.connect(proxy.url).model("tiny")
        before = sum(proxy.passed)
        found = experiment(there)
        assert sum(proxy.passed) - before < 64 * 1024
    expected = experiment(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_servers_are_workers_of_a_sweep(there: RemoteModel, model: HookedTransformer, monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = [
        Intervention(f"blocks.{one % 4}.hook_resid_mid", "add", torch.randn(12, generator=generator), pos=one % 7)
        for one in range(200)
    ]
    options: dict[str, Any] = {"memory_budget": 2 * 7 * 12 * 112 * 4 * 25, **QUIET}
    tokens, metric = tiny_tokens(2, 7), metrics.logit_diff([3, 4], [5, 6])
    expected = sweep(model, tokens, cells, metric, **options)
    with Servers(model, there, there) as workers:
        assert torch.equal(sweep(model, tokens, cells, metric, workers=workers, **options), expected)
        # A server that is gone is done without.
        lost = workers.workers[0]
        monkeypatch.setattr(lost, "there", SimpleNamespace(run_body=_refused))
        assert torch.equal(sweep(model, tokens, cells, metric, workers=workers, **options), expected)
    with pytest.raises(ValueError, match="is another model than this one"):
        Servers(tiny_model(n_layers=4, dtype=torch.float32, seed=3), there)
    with pytest.raises(ValueError, match="takes models on servers"):
        Servers(model)


def _refused(body: bytes) -> bytes:
    raise ConnectionError("gone")
