"""The server's endpoints, in this process: what each answers, and what it refuses before anything is queued."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from starlette.testclient import TestClient

from hooked_lm import HookedTransformer, Intervention, metrics
from hooked_lm.remote.app import make_app
from hooked_lm.remote.jobs import Job, JobQueue
from hooked_lm.remote.protocol import RemoteError
from hooked_lm.remote.results import ResultStore
from hooked_lm.remote.service import Service
from hooked_lm.remote.tokens import UserTable
from hooked_lm.sweep import sweep
from hooked_lm.sweep.wire import SweepPart, part_to_bytes, scores_from_bytes
from hooked_lm.tracing.wire import to_bytes
from tests.helpers import tiny_tokens
from tests.remote_helpers import body_of, service_of, small_trace, token_of, users_table

JOBS = "/v1/models/tiny/jobs"


@pytest.fixture(scope="module")
def service(model: HookedTransformer, folder: Path) -> Iterator[Service]:
    with service_of(
        folder / "model", users_table(folder), body=2**20, nodes=400, tokens=2000, runs=20, flops=1e13
    ) as made:
        yield made


@pytest.fixture(scope="module")
def ann(service: Service) -> Iterator[TestClient]:
    with client_of(service, "ann") as client:
        yield client


@contextmanager
def client_of(service: Service, user: str) -> Generator[TestClient]:
    headers = {"Authorization": f"Bearer {token_of(user)}"}
    with TestClient(make_app(service, heartbeat=0.2), headers=headers) as client:
        yield client


@contextmanager
def held(service: Service) -> Generator[None]:
    """The worker stands still."""
    process = service.models["tiny"].replicas[0].process
    os.kill(int(process.pid or 0), signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(int(process.pid or 0), signal.SIGCONT)


def ended(client: TestClient, job: str) -> dict[str, Any]:
    for _ in range(600):
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        if found["state"] not in ("queued", "running"):
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def queued(service: Service) -> float:
    return sum(len(model.queue) for model in service.models.values())


def refused(answer: httpx.Response, status: int, kind: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()
    assert (answer.status_code, found["kind"]) == (status, kind), answer.text
    for word in words:
        assert word in found["message"], found["message"]
    return found


def test_a_trace_from_body_to_result(ann: TestClient, model: HookedTransformer) -> None:
    answer = ann.post(JOBS, content=body_of(model))
    assert answer.status_code == 202
    job = answer.json()
    assert len(job["job"]) == 64
    assert [one["kind"] for one in job["plan"]["passes"]] == ["pass"]
    assert job["plan"]["flops"] > 0
    assert job["plan"]["seconds"] > 0
    assert ended(ann, job["job"])["state"] == "done"
    result = ann.get(f"/v1/jobs/{job['job']}/result")
    assert torch.equal(load(result.content)["0"], small_trace(model).run()["score"])
    assert json.loads(json.loads(result.content[8:].split(b"}}")[0] + b"}}")["__metadata__"]["names"]) == ["score"]
    part = ann.get(f"/v1/jobs/{job['job']}/result", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, result.content[10:20])


def test_equal_traces_of_one_user_are_one_job(service: Service, ann: TestClient, model: HookedTransformer) -> None:
    body = body_of(model, 1)
    first = ann.post(f"{JOBS}?attempt=a", content=body).json()["job"]
    ended(ann, first)
    again = ann.post(f"{JOBS}?attempt=b", content=body).json()
    assert (again["job"], again["state"]) == (first, "done")
    assert ann.post(f"{JOBS}?together=0", content=body).json()["job"] != first
    with client_of(service, "bob") as bob:
        other = bob.post(JOBS, content=body).json()["job"]
        assert other != first
        refused(bob.get(f"/v1/jobs/{first}"), 404, "unknown job")
        refused(bob.get(f"/v1/jobs/{first}/result"), 404, "unknown job")
        refused(bob.delete(f"/v1/jobs/{first}"), 404, "unknown job")
    # A dropped result is made anew, for another attempt.
    service.results.drop(first)
    refused(ann.get(f"/v1/jobs/{first}/result"), 410, "gone", "run the trace again")
    assert ann.post(f"{JOBS}?attempt=b", content=body).json()["job"] == first
    assert ended(ann, first)["state"] == "done"


def test_models_and_what_is_told_of_them(ann: TestClient, model: HookedTransformer) -> None:
    assert ann.get("/v1/models").json() == {"models": [{"name": "tiny", "state": "ready"}]}
    told = ann.get("/v1/models/tiny").json()
    assert told["config"]["n_layers"] == 4
    assert [name for name, _ in told["axes"]] == list(model.hook_dict)
    assert told["weights"]["embed.W_E"] == [20, 12]
    assert told["limits"]["nodes"] == 400
    assert told["scopes"] == ["gradient", "trace", "weight"]
    refused(ann.get("/v1/models/huge"), 404, "unknown model", "'huge'", "tiny")
    refused(ann.post("/v1/models/huge/jobs", content=b"x"), 404, "unknown model")
    assert ann.get("/healthz").json() == {"ready": True, "models": {"tiny": "ready"}}


def test_counts_in_the_format_of_prometheus(ann: TestClient, model: HookedTransformer) -> None:
    ended(ann, ann.post(JOBS, content=body_of(model, 2)).json()["job"])
    answer = ann.get("/metrics")
    lines = answer.text.splitlines()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE hooked_lm_jobs_total counter" in lines
    (done,) = [line for line in lines if line.startswith('hooked_lm_jobs_total{state="done"} ')]
    assert float(done.split()[-1]) >= 1
    assert "hooked_lm_jobs_waiting 0" in lines
    assert "hooked_lm_workers 1" in lines


@pytest.mark.parametrize("given", [None, "Bearer ", "Bearer wrong", "Basic anns-token", "anns-token", "Bearer é"])
def test_without_a_known_token_nothing_is_answered(service: Service, given: str | None) -> None:
    with TestClient(make_app(service)) as client:
        headers = {} if given is None else {"Authorization": given.encode()}
        answer = client.get("/v1/models", headers=headers)
        refused(answer, 401, "unauthorized", "token")
        assert answer.headers["www-authenticate"] == "Bearer"
        refused(client.post(JOBS, content=b"", headers=headers), 401, "unauthorized")


def test_each_kind_of_node_needs_its_scope(service: Service, model: HookedTransformer) -> None:
    with model.trace(run=False) as gradient:
        run = gradient.prompts([[1, 2]])
        gradient.gradient(run.metric(metrics.logit(3)).sum(), of=run["resid_pre", 0]).save("g")
    with model.trace(run=False) as weight:
        weight.weight("unembed.W_U").sum().save("w")
    with client_of(service, "bob") as bob:
        assert bob.post(JOBS, content=body_of(model, 3)).status_code == 202
        for trace, scope in ((gradient, "gradient"), (weight, "weight")):
            body = to_bytes(trace.graph, trace.target)
            refused(bob.post(JOBS, content=body), 403, "scope", f"'{scope}'", "'bob' has trace")
            refused(bob.post("/v1/models/tiny/check", content=body), 403, "scope")
    with client_of(service, "eve") as eve:
        refused(eve.post(JOBS, content=body_of(model, 3)), 403, "scope", "'trace'", "none")


def test_a_check_queues_nothing(service: Service, ann: TestClient, model: HookedTransformer) -> None:
    before = len(service._jobs)
    answer = ann.post("/v1/models/tiny/check", content=body_of(model, 99))
    assert answer.status_code == 200
    assert set(answer.json()) == {"format", "passes", "flops", "memory", "seconds"}
    assert len(service._jobs) == before


def many(model: HookedTransformer, what: str) -> bytes:
    """A trace beyond one of the limits."""
    trace = model.trace(run=False)
    run = trace.prompts([[1, 2, 3]])
    value = run["resid_pre", 0].sum()
    if what == "nodes":
        for number in range(500):
            value = value + number
    elif what == "runs":
        value = trace.stack([trace.prompts([[one // 19, one % 19]])["resid_pre", 0].sum() for one in range(30)]).sum()
    elif what == "tokens":
        value = trace.prompts([[1] * 16] * 200)["resid_pre", 0].sum()
    elif what == "bytes of saved values":
        value = trace.randn(2**12, 2**13, seed=0)
    elif what == "bytes in one value":
        value = trace.randn(2**20, 2**20, seed=0).sum()
    elif what == "operations":
        big = trace.randn(2**14, 2**14, seed=0)
        value = (big @ big @ big @ big @ big @ big).sum()
    value.save("x")
    return to_bytes(trace.graph, trace.target)


@pytest.mark.parametrize(
    "what", ["nodes", "runs", "tokens", "bytes of saved values", "bytes in one value", "operations"]
)
def test_beyond_a_limit_nothing_is_queued(
    service: Service, ann: TestClient, model: HookedTransformer, what: str
) -> None:
    body = many(model, what)
    for path in (JOBS, "/v1/models/tiny/check"):
        found = refused(ann.post(path, content=body), 422, "limit", what, "this server takes")
    assert (found["node"] is not None) == (what in ("bytes of saved values", "bytes in one value", "operations"))
    assert queued(service) == 0


def test_a_body_is_counted_while_it_comes(ann: TestClient) -> None:
    sent = []

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b"x" * 2**16

    refused(ann.post(JOBS, content=b"x" * (2**20 + 1)), 413, "limit")
    refused(ann.post(JOBS, content=pieces()), 413, "limit", "more than 1048576 bytes")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "cut off"),
        (b"\xff" * 8, "cut off"),
        ((2**19).to_bytes(8, "little") + b"[" * 2**19, "levels deep"),
        ((4).to_bytes(8, "little") + b"\xff\xfe{}", "utf-8"),
        ((8).to_bytes(8, "little") + b'{"a":NaN', "is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "begins with an object"),
        ((2).to_bytes(8, "little") + b"{}", "tensors"),
    ],
)
def test_what_is_no_trace(ann: TestClient, body: bytes, message: str) -> None:
    found = ann.post(JOBS, content=body)
    assert found.status_code == 422
    assert message in found.json()["message"]


def changed(body: bytes, **changes: object) -> bytes:
    length = int.from_bytes(body[:8], "little")
    document = {**json.loads(body[8 : 8 + length]), **changes}
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + body[8 + length :]


def test_a_newer_client_hears_both_versions(ann: TestClient, model: HookedTransformer) -> None:
    body = body_of(model)
    refused(ann.post(JOBS, content=changed(body, version=2)), 409, "version", "version 2", "up to 1")
    refused(ann.post(JOBS, content=changed(body, ops=7)), 409, "version", "version 7", "up to 1")
    refused(ann.get("/v1/models", headers={"Hooked-LM-Protocol": "2"}), 409, "version", "2", "this server 1")
    refused(ann.get("/v1/models", headers={"Hooked-LM-Protocol": "new"}), 409, "version")
    assert ann.get("/v1/models").headers["hooked-lm-protocol"] == "1"


def test_a_node_that_does_not_fit_is_named(ann: TestClient, model: HookedTransformer) -> None:
    body = body_of(model)
    nodes = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["nodes"]
    at = next(index for index, node in enumerate(nodes) if node["kind"] == "write")
    nodes[at]["site"] = "blocks.9.hook_resid_post"
    found = refused(ann.post(JOBS, content=changed(body, nodes=nodes)), 422, "trace", "blocks.9.hook_resid_post")
    assert found["node"] == at


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def test_events_tell_the_place_the_progress_and_the_end(
    service: Service, ann: TestClient, model: HookedTransformer
) -> None:
    with held(service):
        ann.post(JOBS, content=body_of(model, 20))
        second = ann.post(JOBS, content=body_of(model, 21)).json()
        third = ann.post(JOBS, content=body_of(model, 22)).json()
        assert (second["position"], third["position"]) == (1, 2)
    found = events_of(ann.get(f"/v1/jobs/{third['job']}/events").text)
    numbers = [number for number, _, _ in found]
    kinds = [kind for _, kind, _ in found]
    assert numbers == sorted(set(numbers))
    assert kinds[-1] == "done"
    assert [kind for kind in ("queued", "running", "done") if kind in kinds][-1] == "done"
    # From a later event on, and from the last one: only what was missed.
    missed = events_of(ann.get(f"/v1/jobs/{third['job']}/events", headers={"Last-Event-ID": str(numbers[-1] - 1)}).text)
    assert [kind for _, kind, _ in missed] == ["done"]
    assert not events_of(ann.get(f"/v1/jobs/{third['job']}/events", headers={"Last-Event-ID": str(numbers[-1])}).text)
    refused(ann.get(f"/v1/jobs/{third['job']}/events", headers={"Last-Event-ID": "x"}), 422, "event")


def test_no_more_than_so_many_jobs_of_one_user_wait(
    service: Service, ann: TestClient, model: HookedTransformer
) -> None:
    with held(service), client_of(service, "bob") as bob:
        jobs = [ann.post(JOBS, content=body_of(model, 30 + one)) for one in range(5)]
        assert {one.status_code for one in jobs} == {202}
        refused(ann.post(JOBS, content=body_of(model, 36)), 429, "queue full", "4 of your jobs wait already")
        other = bob.post(JOBS, content=body_of(model, 37))
        assert other.status_code == 202
        assert other.json()["position"] == 2  # after one of ann's
    for one in jobs:
        assert ended(ann, one.json()["job"])["state"] == "done"


def test_users_take_turns() -> None:
    queue = JobQueue(10)

    def add(user: str, name: str) -> Job:
        job = Job(name, user, "m", b"", "", {}, "trace")
        queue.put(job)
        return job

    for user, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("c", "c2")):
        add(user, name)
    taken = [queue.take(), queue.take()]
    back = taken[1]
    assert back is not None
    queue.put_back(back)
    order = [one.id for one in taken if one] + [one.id for _ in range(5) if (one := queue.take())]
    assert order == ["a1", "b1", "b1", "c1", "a2", "c2", "a3"]
    assert len(queue) == 0
    queue.close()
    assert queue.take() is None


def test_a_job_that_waits_is_cancelled_at_once_and_one_that_runs_at_its_next_hook(
    service: Service, ann: TestClient, model: HookedTransformer
) -> None:
    trace = model.trace(run=False)
    trace.generate([[1, 2]] * 60, max_new_tokens=13)["resid_post", 3].at(pos=-1).save("x")
    long = to_bytes(trace.graph, trace.target)
    with held(service):
        running = ann.post(JOBS, content=long).json()["job"]
        while ann.get(f"/v1/jobs/{running}").json()["state"] != "running":
            time.sleep(0.01)
        waiting = ann.post(JOBS, content=body_of(model, 41)).json()["job"]
        assert ann.delete(f"/v1/jobs/{waiting}").json()["state"] == "cancelled"
        ann.delete(f"/v1/jobs/{running}")
        time.sleep(0.2)
    assert ended(ann, running)["state"] == "cancelled"
    refused(ann.get(f"/v1/jobs/{running}/result"), 409, "cancelled")
    # The worker lives on, and another attempt runs the trace.
    assert ann.post(f"{JOBS}?attempt=new", content=long).json()["state"] in ("queued", "running")
    assert ended(ann, running)["state"] == "done"
    assert ann.delete(f"/v1/jobs/{running}").json()["state"] == "done"


def test_a_result_is_there_once_the_job_is_done(service: Service, ann: TestClient, model: HookedTransformer) -> None:
    with held(service):
        job = ann.post(JOBS, content=body_of(model, 50)).json()["job"]
        refused(ann.get(f"/v1/jobs/{job}/result"), 409, "not done")
    ended(ann, job)
    assert ann.get(f"/v1/jobs/{job}/result").status_code == 200
    refused(ann.get("/v1/jobs/none/result"), 404, "unknown job")


def test_results_are_dropped_after_a_while_and_beyond_a_size(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, 0.2, 100)
    store.put("a", b"x" * 60)
    assert store.path("a") is not None
    store.put("b", b"x" * 60)  # both together are too many
    assert store.path("a") is None
    assert [one.name for one in tmp_path.iterdir()] == ["b"]
    time.sleep(0.25)
    assert store.path("b") is None
    assert not list(tmp_path.iterdir())


def test_part_of_a_sweep_is_a_body_too(service: Service, ann: TestClient, model: HookedTransformer) -> None:
    tokens = tiny_tokens(2, 7)
    cells = tuple((Intervention(f"blocks.{layer}.hook_mlp_out", "zero", pos=3),) for layer in range(4))
    part = SweepPart(tokens, torch.ones_like(tokens), metrics.logit([1, 2]), (), cells)
    body = part_to_bytes(part)
    job = ann.post(JOBS, content=body).json()["job"]
    assert ended(ann, job)["state"] == "done"
    found = scores_from_bytes(ann.get(f"/v1/jobs/{job}/result").content)
    expected = sweep(model, tokens, cells, metrics.logit([1, 2]), per_prompt=True, incremental=False, verbose=False)
    assert torch.equal(found, expected)
    bad = part_to_bytes(SweepPart(tokens, torch.ones_like(tokens), metrics.logit(1), (), cells * 120))
    refused(ann.post(JOBS, content=bad), 422, "limit", "480 cells")
    wrong = (Intervention("blocks.9.hook_mlp_out", "zero"),)
    job = ann.post(
        JOBS, content=part_to_bytes(SweepPart(tokens, torch.ones_like(tokens), metrics.logit(1), (), (wrong,)))
    ).json()["job"]
    assert "blocks.9" in ended(ann, job)["error"]["message"]
    refused(ann.post(JOBS, content=changed(body, version=5)), 409, "version", "of sweeps")
    deep = changed(body, cells="[" * 200 + "]" * 200)
    refused(ann.post(JOBS, content=deep), 422, "limit", "200 levels deep")
    refused(ann.post(JOBS, content=changed(body, cells="[]")), 422, "sweep")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("{}", "a file of tokens is"),
        ('{"tokens": []}', "a file of tokens is"),
        ('{"tokens": [{"user": "a", "sha256": "0"}]}', "has user, sha256 and scopes"),
        ('{"tokens": [{"user": "", "sha256": "0", "scopes": []}]}', "a user is a name"),
        ('{"tokens": [{"user": "a", "sha256": "secret", "scopes": []}]}', "64 hexadecimal digits"),
        (f'{{"tokens": [{{"user": "a", "sha256": "{"0" * 64}", "scopes": ["root"]}}]}}', "scopes are of trace"),
    ],
)
def test_a_file_of_tokens_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        UserTable.read(path)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"), service_of(tmp_path / "nowhere"):
        pass


def test_errors_are_told_as_data() -> None:
    error = RemoteError(507, "memory", "too much", 3)
    assert error.as_data() == {"status": 507, "kind": "memory", "message": "too much", "node": 3}
