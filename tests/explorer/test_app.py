"""What the explorer computes is what the model computes, and what cannot be meant is said to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from hooked_lm import HookedTransformer, metrics, patching
from hooked_lm.cli.explore import _loaded
from hooked_lm.explorer import make_app
from hooked_lm.explorer.app import ASSETS
from tests.helpers import tiny_model
from tests.remote_helpers import listening, saved_model, service_of
from tests.serving import at_socket

PROMPT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
LOAD = 'from hooked_lm import HookedTransformer\n\nmodel = HookedTransformer.from_pretrained("demo-tasks-4l")'
PAIR = {"prompt": PROMPT, "corrupted": OTHER, "answer": " Mary", "wrong": " John"}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return HookedTransformer.from_pretrained("demo-tasks-4l")


@pytest.fixture(scope="module")
def client(model: HookedTransformer) -> TestClient:
    return client_of(model)


def client_of(model: Any, load: str = LOAD) -> TestClient:
    return TestClient(make_app(model, "demo-tasks-4l", load), base_url="http://localhost")


def ask(client: TestClient, view: str, /, **fields: object) -> dict[str, Any]:
    answer = client.post(f"/api/{view}", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(client: TestClient, view: str, /, **fields: object) -> str:
    answer = client.post(f"/api/{view}", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 422, answer.text
    return str(answer.json()["error"])


def close(found: object, expected: Tensor, atol: float = 1e-5) -> bool:
    return torch.allclose(torch.tensor(found).double(), expected.detach().double(), atol=atol)


# The same numbers


@torch.no_grad()
def test_tokens_and_next_tokens(client: TestClient, model: HookedTransformer) -> None:
    found = ask(client, "run")
    assert [token["text"] for token in found["tokens"]] == model.to_str_tokens(PROMPT)
    probabilities, tokens = model(PROMPT)[0].softmax(-1).topk(10)
    assert [[one["id"] for one in row] for row in found["next"]] == tokens.tolist()
    assert close([[one["probability"] for one in row] for row in found["next"]], probabilities)
    assert found["next"][-1][0]["text"] == " Mary"


@torch.no_grad()
def test_patterns_of_all_heads(client: TestClient, model: HookedTransformer) -> None:
    patterns = torch.tensor(ask(client, "attention")["patterns"])
    _, cache = model.run_with_cache(PROMPT)
    assert patterns.shape == (4, 6, 15, 15)
    assert (patterns / 1000 - cache.stack_activation("pattern")[:, 0]).abs().max() <= 0.0005 + 1e-6


@torch.no_grad()
def test_the_logit_lens(client: TestClient, model: HookedTransformer) -> None:
    found = ask(client, "lens")
    assert found["sites"] == [*(f"before layer {layer}" for layer in range(4)), "at the end"]
    _, cache = model.run_with_cache(PROMPT)
    for layer, row in enumerate(found["cells"]):
        stream = cache["resid_pre", layer] if layer < 4 else cache["resid_post", 3]
        probabilities, tokens = model.logits_of(stream)[0].softmax(-1).topk(5)
        assert close([[one["probability"] for one in cell] for cell in row], probabilities)
        assert [cell[0]["id"] for cell in row] == tokens[:, 0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("pos", [None, 4])
def test_attribution_is_that_of_the_cache(client: TestClient, model: HookedTransformer, pos: int | None) -> None:
    found = ask(client, "attribute", answer=" Mary", pos=pos)
    place = 14 if pos is None else pos
    logits, cache = model.run_with_cache(PROMPT)
    token = model.to_single_token(" Mary")
    cache.compute_head_results()
    heads, labels = cache.stack_head_results(return_labels=True)
    expected = cache.logit_attrs(heads[:, 0, place : place + 1], token, pos_slice=place, batch_slice=0)
    assert close(found["heads"], expected.view(4, 6), 1e-4), labels
    assert close(found["logit"], logits[0, place, token], 1e-4)
    total = sum(map(sum, found["heads"])) + sum(found["mlps"]) + sum(found["others"].values())
    assert total == pytest.approx(found["logit"], abs=1e-4)
    assert found["answer"] == " Mary"
    assert abs(found["others"]["biases and the rest"]) < 2


KINDS = {
    "LN": {"normalization_type": "LN"},
    "RMS": {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 4},
    "none": {"normalization_type": None},
    "attention only": {"attn_only": True},
    "grouped": {"n_key_value_heads": 2, "n_heads": 4},
    "post norms": {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    "parallel": {"parallel_attn_mlp": True},
    "soft cap": {"output_logits_soft_cap": 5.0},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_attribution_of_other_architectures_sums_to_the_logit_but_for_biases(kind: str) -> None:
    model = tiny_model(dtype=torch.float64, **KINDS[kind])
    for name, parameter in model.named_parameters():
        if "b_" in name.rpartition(".")[2] or name.endswith(".b"):
            parameter.zero_()
    client = client_of(model)
    found = ask(client, "attribute", prompt="1 2 3 4", answer="5")
    assert found["others"]["biases and the rest"] == pytest.approx(0.0, abs=1e-8)
    assert found["before_cap"] == (kind == "soft cap")


@torch.no_grad()
def test_patched_runs_are_those_of_patching(client: TestClient, model: HookedTransformer) -> None:
    found = ask(client, "patch", **PAIR)
    difference = metrics.logit_diff(model.to_single_token(" Mary"), model.to_single_token(" John"))
    clean_logits, cache = model.run_with_cache(PROMPT)
    clean, corrupted = difference(clean_logits), difference(model(OTHER))
    assert close(found["clean"], clean, 1e-4)
    assert close(found["corrupted"], corrupted, 1e-4)
    tokens = model.to_tokens(OTHER)
    stream = patching.get_act_patch_resid_pre(model, tokens, cache, difference)
    heads = patching.get_act_patch_attn_head_out_all_pos(model, tokens, cache, difference)
    assert close(found["stream"], (stream - corrupted) / (clean - corrupted), 1e-4)
    assert close(found["heads"], (heads - corrupted) / (clean - corrupted), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "layer", "index"), [("stream", 0, 10), ("head", 3, 1)])
def test_a_patched_cell_is_that_run(
    client: TestClient, model: HookedTransformer, kind: str, layer: int, index: int
) -> None:
    found = ask(client, "patch_cell", **PAIR, kind=kind, layer=layer, index=index)
    _, cache = model.run_with_cache(PROMPT)
    site = ("resid_pre" if kind == "stream" else "z", layer)

    def put(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        if kind == "stream":
            changed[:, index] = cache[site][:, index]
        else:
            changed[:, :, index] = cache[site][:, :, index]
        return changed

    name = f"blocks.{layer}.{'hook_resid_pre' if kind == 'stream' else 'attn.hook_z'}"
    logits = model.run_with_hooks(OTHER, fwd_hooks=[(name, put)])
    expected = logits[0, -1].softmax(-1)
    for row in found["rows"]:
        assert row["patched"] == pytest.approx(float(expected[row["id"]]), abs=1e-5)
        assert row["clean"] == pytest.approx(float(model(PROMPT)[0, -1].softmax(-1)[row["id"]]), abs=1e-5)
    assert {" Mary", " John"} <= {row["text"] for row in found["rows"]}


@torch.no_grad()
def test_ablated_heads_write_nothing(client: TestClient, model: HookedTransformer) -> None:
    found = ask(client, "ablate", heads=[[1, 1], [1, 2]], pos=14)

    def zero(activation: Tensor, hook: object) -> Tensor:
        changed = activation.clone()
        changed[:, :, [1, 2]] = 0
        return changed

    expected = model.run_with_hooks(PROMPT, fwd_hooks=[("blocks.1.attn.hook_z", zero)])[0, 14].softmax(-1)
    for row in found["rows"]:
        assert row["ablated"] == pytest.approx(float(expected[row["id"]]), abs=1e-5)
    nothing = ask(client, "ablate", heads=[])
    assert all(row["ablated"] == pytest.approx(row["intact"], abs=1e-6) for row in nothing["rows"])


@torch.no_grad()
def test_a_steered_continuation_is_that_of_generate(client: TestClient, model: HookedTransformer) -> None:
    found = ask(client, "steer", towards=" John", away=" Mary", layer=1, coefficient=2.5, length=5)
    ends = [model.run_with_cache(text)[1]["resid_post", 1][0, -1] for text in (" John", " Mary")]
    direction = 2.5 * (ends[0] - ends[1])
    assert found["norm"] == pytest.approx(float(direction.norm()), rel=1e-5)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    tokens = model.to_tokens(PROMPT)
    plain = model.generate(tokens, **settings)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda activation, hook: activation + direction)]):
        steered = model.generate(tokens, **settings)
    assert found["plain"] == [model.to_single_str_token(int(one)) for one in plain[0, 15:]]
    assert found["steered"] == [model.to_single_str_token(int(one)) for one in steered[0, 15:]]


# Python


VIEWS: dict[str, dict[str, object]] = {
    "run": {"pos": 4},
    "attention": {"layer": 2, "head": 3},
    "lens": {},
    "attribute": {"answer": " Mary"},
    "patch": PAIR,
    "patch_cell": {**PAIR, "kind": "head", "layer": 3, "index": 1},
    "ablate": {"heads": [[1, 1], [3, 2]]},
    "steer": {"towards": " John", "away": " Mary", "layer": 1, "coefficient": 2.5, "length": 5},
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_python_runs_and_gives_the_numbers_of_the_page(client: TestClient, view: str) -> None:
    code = ask(client, "code", view=view, **VIEWS[view])["code"]
    printed: list[object] = []
    shown: dict[str, Any] = {"print": lambda *values: printed.append(values)}
    exec(code, shown)
    page, t = ask(client, view, **VIEWS[view]), shown["t"]
    assert printed
    if view == "run":
        assert close([one["probability"] for one in page["next"][4]], t["probabilities"][0])
    elif view == "attention":
        assert close(page["patterns"][2][3], 1000 * t["patterns"][0, 3], 0.51)
    elif view == "lens":
        assert close([row[0]["probability"] for row in page["cells"][3]], t["3"][0].max(-1).values)
    elif view == "attribute":
        assert close(page["heads"], torch.cat([t[str(layer)] for layer in range(4)]), 1e-4)
    elif view == "patch":
        assert close(page["stream"], shown["shares"], 1e-4)
    elif view == "patch_cell":
        assert close([row["patched"] for row in page["rows"]], t["patched"][0][[row["id"] for row in page["rows"]]])
    elif view == "ablate":
        assert close([row["ablated"] for row in page["rows"]], t["ablated"][0][[row["id"] for row in page["rows"]]])
    else:
        assert len(page["steered"]) == len(t["steered"][0])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_python_of_the_attribution_fits_the_architecture(kind: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float64, **KINDS[kind])
    client = client_of(model, load="model = given")
    code = ask(client, "code", view="attribute", prompt="1 2 3 4", answer="5")["code"]
    exec(code, shown := {"given": model, "print": lambda *values: None})
    found = ask(client, "attribute", prompt="1 2 3 4", answer="5")["heads"]
    assert close(
        found, torch.stack([shown["t"][str(layer)].flatten() for layer in range(model.cfg.n_layers)]).double(), 1e-8
    )


# Another place for the model


def test_a_model_on_a_server_is_explored_alike(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", n_layers=2)
    with service_of(tmp_path / "model") as service, listening(service) as address:
        served, name, load = _loaded(f"{address}/tiny", "cpu", None, None, True, None)
        assert name == "tiny"
        assert load == f'import hooked_lm\n\nmodel = hooked_lm.connect("{address}").model("tiny")'
        remote = client_of(served)
        local = client_of(model)
        fields = {"prompt": "1 2 3 4", "corrupted": "1 5 3 4", "answer": "7", "wrong": "8"}
        for view, more in {
            "run": {},
            "lens": {},
            "attribute": {"answer": "7"},
            "patch": fields,
            "ablate": {"heads": [[1, 0]]},
            "steer": {"towards": "1", "away": "2", "layer": 0, "coefficient": 1.0, "length": 3},
        }.items():
            one, other = (ask(client, view, **{"prompt": "1 2 3 4", **more}) for client in (remote, local))
            assert json.dumps(one) == json.dumps(other) or _same(one, other), view


def _same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == pytest.approx(other, abs=1e-5)


# What is wrong is said


@pytest.mark.parametrize(
    ("view", "fields", "message"),
    [
        ("run", {"prompt": ""}, "the prompt is empty"),
        ("run", {"prompt": 3}, "prompt is a text, got int"),
        ("run", {"prompt": "a " * 300}, "tokens; the page shows 64 at most"),
        (
            "attribute",
            {"answer": "store"},
            "the answer 'store' is 2 tokens ('st', 'ore'), and an answer is one; ' store' is one",
        ),
        ("attribute", {"answer": " Mary John"}, "is 2 tokens (' Mary', ' John'), and an answer is one"),
        ("attribute", {"answer": " Mary", "pos": 15}, "pos is a whole number from -15 to 14, got 15"),
        ("patch", {**PAIR, "corrupted": "When"}, "the two prompts have 15 and 2 tokens"),
        ("patch", {**PAIR, "corrupted": PROMPT}, "both prompts have the same logit difference"),
        ("patch_cell", {**PAIR, "kind": "mlp"}, "kind is one of stream, head, got 'mlp'"),
        ("patch_cell", {**PAIR, "kind": "head", "layer": 4, "index": 0}, "layer is a whole number from 0 to 3, got 4"),
        ("patch_cell", {**PAIR, "kind": "head", "layer": 0, "index": 6}, "index is a whole number from 0 to 5"),
        ("ablate", {"heads": [[4, 0]]}, "heads are pairs [layer, head], of 4 layers with 6 heads"),
        ("ablate", {"heads": "all"}, "heads are pairs"),
        (
            "steer",
            {"towards": " a", "away": " b", "layer": 0, "coefficient": None},
            "coefficient is a number from -100 to 100",
        ),
        (
            "steer",
            {"towards": " a", "away": " b", "layer": 0, "coefficient": 1, "length": 99},
            "length is a whole number from 1 to 40",
        ),
        ("code", {"view": "all"}, "view is one of run, attention"),
    ],
)
def test_a_request_that_makes_no_sense_says_why(
    client: TestClient, view: str, fields: dict[str, object], message: str
) -> None:
    assert message in refused(client, view, **fields)


def test_prompts_of_a_model_without_a_tokenizer_are_numbers() -> None:
    client = client_of(tiny_model())
    assert [token["id"] for token in ask(client, "run", prompt="1, 2 3")["tokens"]] == [1, 2, 3]
    assert "token numbers: 0 5 9 12" in refused(client, "run", prompt="one two")
    assert "this model has tokens 0 to" in refused(client, "run", prompt="1 99999")
    assert "the answer is a token number from 0 to" in refused(client, "attribute", prompt="1 2", answer="x")


def test_a_bidirectional_model_is_refused() -> None:
    with pytest.raises(ValueError, match="it takes causal models with one layer or more"):
        client_of(tiny_model(attention_dir="bidirectional"))


# Others are kept out


def test_requests_of_other_pages_are_refused(client: TestClient) -> None:
    elsewhere = client.get("/", headers={"host": "evil.example"})
    assert elsewhere.status_code == 403
    assert client.post("/api/run", headers={"host": "evil.example"}, json={"prompt": PROMPT}).status_code == 403
    form = client.post("/api/run", content=json.dumps({"prompt": PROMPT}), headers={"content-type": "text/plain"})
    assert form.status_code == 415
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]
    assert client.post("/api/other", json={}).status_code == 404
    assert client.get("/assets/../app.py").status_code == 404


@pytest.mark.parametrize("body", [b"{", b"[1]", b"[" * 100_000, b'"' + b"x" * 300_000 + b'"'])
def test_bodies_that_are_no_requests_are_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/api/run", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_the_assets_ask_for_nothing_from_elsewhere() -> None:
    for path in ASSETS.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("https://", "http://") or path.suffix == ".svg", path.name


def test_an_older_request_for_a_view_is_not_computed_once_a_newer_has_come(model: HookedTransformer) -> None:
    import threading

    import httpx

    from hooked_lm.explorer import views

    started, go, computed = threading.Event(), threading.Event(), list[str]()
    original = views.VIEWS["run"]

    def slow(given: Any, fields: dict[str, Any]) -> dict[str, Any]:
        computed.append(fields["prompt"])
        started.set()
        assert go.wait(10)
        return original(given, fields)

    views.VIEWS["run"] = slow
    try:
        with at_socket(make_app(model, "model", LOAD)) as address:
            answers: dict[str, dict[str, Any]] = {}

            def send(prompt: str) -> None:
                answers[prompt] = httpx.post(f"{address}/api/run", json={"prompt": prompt}, timeout=20).json()

            threads = [threading.Thread(target=send, args=(prompt,)) for prompt in ("one", "two", "three")]
            threads[0].start()
            assert started.wait(10)
            for thread in threads[1:]:
                thread.start()
                threading.Event().wait(0.2)
            go.set()
            for thread in threads:
                thread.join(20)
    finally:
        views.VIEWS["run"] = original
    assert computed == ["one", "three"]
    assert answers["two"] == {"superseded": True}
    assert "next" in answers["one"]
    assert "next" in answers["three"]
