"""Traces as bytes: the same experiment has the same hash, and whatever else is refused before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from hooked_lm import tracing
from hooked_lm.metrics import Metric, kl_to, log_prob
from hooked_lm.tracing import Trace, TraceError
from hooked_lm.tracing.reading import from_bytes
from hooked_lm.tracing.wire import to_bytes
from tests.helpers import tiny_model, tiny_tokens

MODEL = tiny_model()
TARGET = MODEL.trace(run=False).target
DIRECTION = torch.linspace(-1, 1, 12, dtype=torch.float64)


def experiment() -> Trace:
    trace = MODEL.trace(run=False)
    task = trace.prompts([[1, 2, 3], [4, 5]])
    h = task["resid_post", 0].at(pos=-1).mean("batch") * 2 + DIRECTION
    plain, steered = trace.prompts(tiny_tokens(2, 4)), trace.prompts(tiny_tokens(2, 4))
    steered["resid_post", 0].at(pos=-1).add(h)
    steered["pattern", 1].at(pos=-1, feature=0).scale(float("inf"))
    for name, run in (("before", plain), ("after", steered)):
        run.metric(log_prob([1, 2])).save(name)
    plain.metric(kl_to(torch.zeros(1, 4, 20, dtype=torch.float64))).save("divergence")
    gradient = trace.gradient(plain.metric(log_prob(3)).sum(), of=plain["resid_post", 0])
    gradient.save("gradient")  # type: ignore[union-attr]
    trace.generate([[1, 2]], 3, do_sample=True, top_k=3, seed=5, eos_token_id=7).generated.save("text")
    trace.weight("blocks.0.attn.W_O").norm().save("size")
    return trace


def shuffled() -> Trace:
    """The same experiment, with its lines in another order, and lines that nothing saved needs."""
    trace = MODEL.trace(run=False)
    trace.weight("blocks.0.attn.W_O").norm().save("size")
    steered, unused = trace.prompts(tiny_tokens(2, 4)), trace.prompts([[9, 9]])
    unused["resid_post", 1].zero()
    steered["pattern", 1].at(feature=0, pos=3).scale(float("inf"))
    steered.metric(log_prob(torch.tensor([1, 2]))).save("after")
    plain = trace.prompts(tiny_tokens(2, 4))
    text = trace.generate([[1, 2]], 3, do_sample=True, top_k=3, seed=5, eos_token_id=7)
    text.generated.save("text")
    plain.metric(kl_to(torch.zeros(1, 4, 20, dtype=torch.float64))).save("divergence")
    stream = plain["resid_post", 0]
    trace.gradient(plain.metric(log_prob(3)).sum(), of=stream).save("gradient")  # type: ignore[union-attr]
    plain.metric(log_prob([1, 2])).save("before")
    task = trace.prompts([[1, 2, 3], [4, 5]])
    h = task["resid_post", 0].at(pos=-1).mean("batch") * 2 + DIRECTION
    steered["resid_post", 0].at(pos=-1).add(h)
    return trace


def test_the_hash_does_not_depend_on_the_order_of_the_lines_or_on_dead_ones() -> None:
    assert to_bytes(experiment().graph, TARGET) == to_bytes(shuffled().graph, TARGET)
    assert experiment().hash == shuffled().hash


def test_another_experiment_has_another_hash() -> None:
    seen = {experiment().hash}
    for layer, pos, how, value in ((1, -1, "add", 1.0), (0, 0, "add", 1.0), (0, -1, "scale", 1.0), (0, -1, "add", 2.0)):
        trace = MODEL.trace(run=False)
        run = trace.prompts([[1, 2, 3]])
        run["resid_post", layer].at(pos=pos).write(how, value)  # type: ignore[arg-type]
        run.logits.save("logits")
        seen.add(trace.hash)
    assert len(seen) == 5


def test_a_file_is_read_as_the_experiment_that_was_written(tmp_path: Path) -> None:
    trace = experiment()
    trace.save(tmp_path / "one.trace")
    again = tracing.load(tmp_path / "one.trace", MODEL)
    assert again.hash == trace.hash
    wanted, found = trace.run(), again.run()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, equal_nan=True)
    with pytest.raises(TraceError, match="cannot be read"):
        tracing.load(tmp_path / "none.trace", MODEL)


def test_a_trace_written_by_version_1_is_read_for_ever() -> None:
    content = (Path(__file__).parent / "version_1.trace").read_bytes()
    graph = from_bytes(content, TARGET)
    assert to_bytes(graph, TARGET) == content == to_bytes(experiment().graph, TARGET)


def test_a_metric_of_ones_own_does_not_travel() -> None:
    trace = MODEL.trace(run=False)
    trace.prompts([[1, 2]]).metric(Metric("mine", -1, None, lambda read: read.sum(-1))).save()
    with pytest.raises(TraceError, match="'mine' is a function of this process"):
        trace.hash  # noqa: B018


# What is refused


def changed(change: Callable[[Any], object]) -> bytes:
    content = to_bytes(experiment().graph, TARGET)
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    change(document)
    return packed(json.dumps(document), content[8 + length :])


def packed(text: str, tensors: bytes) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + tensors


def node(document: Any, kind: str) -> Any:
    return next(one for one in document["nodes"] if one["kind"] == kind)


GOOD = to_bytes(experiment().graph, TARGET)
HOSTILE: list[tuple[Callable[[], bytes], str]] = [
    (lambda: b"", "8 bytes"),
    (lambda: b"\xff" * 20, "says that"),
    (lambda: GOOD[:60], "says that"),
    (lambda: GOOD[:-1], "tensors"),
    (lambda: packed("[" * 200_000 + "]" * 200_000, save({})), "nested"),
    (lambda: packed("{" + '"a":' * 3 + "1}", save({})), "not JSON"),
    (lambda: packed('{"format": 1e999}', save({})), "not JSON|too large"),
    (lambda: packed('{"format": NaN}', save({})), "NaN"),
    (lambda: packed('{"format": ' + "9" * 5000 + "}", save({})), "digits"),
    (lambda: packed("[]", save({})), "this is not a hooked_lm trace"),
    (lambda: changed(lambda d: d.update(more=1)), "this is not a hooked_lm trace"),
    (lambda: changed(lambda d: d.update(version=2)), "update hooked_lm"),
    (lambda: changed(lambda d: d.update(ops=2)), "update hooked_lm"),
    (lambda: changed(lambda d: d.update(nodes={})), "are lists"),
    (lambda: changed(lambda d: d["runs"][0].update(tokens=[[1, "2"]])), "lists of integers"),
    (lambda: changed(lambda d: d["runs"][0].update(tokens=[[99]])), "tokens are 0 to 19"),
    (lambda: changed(lambda d: d["runs"][0].update(tokens=[[1] * 500])), "n_ctx"),
    (lambda: changed(lambda d: d["nodes"].append({"kind": "exec", "code": "1"})), "no kind of node"),
    (lambda: changed(lambda d: node(d, "op").update(name="__import__")), "no operation"),
    (lambda: changed(lambda d: node(d, "op").update(path="/etc")), "expected the keys"),
    (lambda: changed(lambda d: node(d, "op").update(operands=[9999])), "no earlier node"),
    (lambda: changed(lambda d: node(d, "op").update(operands=[True])), "no earlier node"),
    (lambda: changed(lambda d: node(d, "read").update(site="blocks.0.attn.W_O")), "no site"),
    (lambda: changed(lambda d: node(d, "read").update(version=7)), "version 7"),
    (lambda: changed(lambda d: node(d, "write").update(ordinal=3)), "ordinal 3"),
    (lambda: changed(lambda d: node(d, "write").update(how="eval")), "an edit is one of"),
    (lambda: changed(lambda d: node(d, "read").update(select={"pos": 99})), "pos 99"),
    (lambda: changed(lambda d: node(d, "read").update(select={"where": 1})), "a selection has"),
    (lambda: changed(lambda d: node(d, "score").update(metric="eval")), "no metric"),
    (lambda: changed(lambda d: node(d, "score").update(arguments={"code": 1})), "does not take"),
    (lambda: changed(lambda d: node(d, "weight").update(name="cfg")), "no parameter"),
    (lambda: changed(lambda d: node(d, "constant").update(value={"tensor": "../x"})), "no tensor of the trace"),
    (lambda: changed(lambda d: d["saves"].update(x=-1)), "no earlier node"),
    (lambda: changed(lambda d: d["saves"].clear() or d["nodes"].clear()), "used by no node"),
    (
        lambda: changed(lambda d: next(r for r in d["runs"] if "decoding" in r)["decoding"].update(seed="x")),
        "whole numbers",
    ),
    (
        lambda: changed(
            lambda d: next(r for r in d["runs"] if "decoding" in r)["decoding"]["sampling"].update(temperature=-1)
        ),
        "temperature",
    ),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_trace_is_refused(content: Callable[[], bytes], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        from_bytes(content(), TARGET)


def test_a_tensor_that_was_changed_is_refused() -> None:
    content = bytearray(GOOD)
    content[-1] ^= 1
    with pytest.raises(TraceError, match="not the one that the trace was made with"):
        from_bytes(bytes(content), TARGET)


def test_a_trace_that_does_not_fit_another_model_is_refused() -> None:
    smaller = tiny_model(n_layers=1).trace(run=False).target
    with pytest.raises(TraceError, match=r"no site|no parameter"):
        from_bytes(GOOD, smaller)


def test_every_single_changed_byte_of_the_json_is_read_alike_or_refused() -> None:
    length = int.from_bytes(GOOD[:8], "little")
    for at in range(8, 8 + length, 7):
        content = bytearray(GOOD)
        content[at] ^= 4
        try:
            from_bytes(bytes(content), TARGET)
        except TraceError:
            continue


def test_reads_and_edits_at_the_steps_of_a_generation_survive_their_bytes() -> None:
    trace = MODEL.trace(run=False)
    text = trace.generate([[1, 2], [3]], 4)
    for step in (slice(1, None), 2, [0, 3], slice(None)):
        text["resid_post", 0].at(pos=-1, step=step).add(1.0)
        text["resid_post", 1].at(pos=[-1], step=step).save(f"state {step}")
    text["resid_post", 1].at(pos=0, step=0).save("first")
    content = to_bytes(trace.graph, trace.target)
    again = from_bytes(content, TARGET)
    assert to_bytes(again, TARGET) == content
    rebuilt = MODEL.trace(run=False)
    rebuilt.graph = again
    expected = trace.run()
    found = rebuilt.run()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("taken", ["name", "self", "operands"])
def test_a_parameter_with_the_name_of_an_argument_is_an_unknown_one(taken: str) -> None:
    def change(document: Any) -> None:
        next(node for node in document["nodes"] if node["kind"] == "op")["params"][taken] = 1

    with pytest.raises(TraceError, match="param"):
        from_bytes(changed(change), TARGET)
