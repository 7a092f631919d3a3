"""The rules of a trace, each two ways, and what is refused as it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hooked_lm import Intervention
from hooked_lm.metrics import Metric, kl_to, log_prob, logit_diff
from hooked_lm.tracing import TraceError, Value
from tests.helpers import tiny_model, tiny_tokens

MODEL = tiny_model(n_layers=3)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
LAST = "blocks.1.hook_resid_post"


def alone(prompt: list[int], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = MODEL.run_with_hooks(torch.tensor([prompt]), prepend_bos=False, **options)
    return logits[0]


def stream(prompt: list[int], name: str = LAST) -> torch.Tensor:
    with torch.no_grad():
        return MODEL.run_with_cache(torch.tensor([prompt]), prepend_bos=False)[1][name][0]


def test_the_function_vector_experiment_in_one_trace_equals_plain_hooked_runs() -> None:
    zero_shot = tiny_tokens(3, 6, seed=1)
    answers = torch.tensor([1, 2, 3])
    with MODEL.trace() as t:
        task = t.prompts(PROMPTS)
        h = task["resid_post", 1].at(pos=-1).mean("batch")
        plain, steered = t.prompts(zero_shot), t.prompts(zero_shot)
        steered["resid_post", 1].at(pos=-1).add(h)
        before, after = (run.metric(log_prob(answers)).save() for run in (plain, steered))
        h.save("h")
    mean = torch.stack([stream(prompt)[-1] for prompt in PROMPTS]).mean(0)
    torch.testing.assert_close(t["h"], mean, rtol=0, atol=1e-12)

    def add(x: torch.Tensor, hook: object) -> None:
        x[:, -1] += mean

    with torch.no_grad():
        edited = MODEL.run_with_hooks(zero_shot, fwd_hooks=[(LAST, add)])
        untouched = MODEL(zero_shot)
    torch.testing.assert_close(before.value, log_prob(answers).per_prompt(untouched), rtol=0, atol=1e-12)
    torch.testing.assert_close(after.value, log_prob(answers).per_prompt(edited), rtol=0, atol=1e-12)


def test_a_read_sees_all_edits_upstream_wherever_they_stand_in_the_block() -> None:
    with MODEL.trace() as t:
        first, second = t.prompts(PROMPTS[:1]), t.prompts(PROMPTS[:1])
        read = first["resid_post", 2].at(pos=-1).save()
        first["resid_post", 0].at(pos=1).zero()
        second["resid_post", 0].at(pos=1).zero()
        other = second["resid_post", 2].at(pos=-1).save()
    assert torch.equal(read.value, other.value)
    assert not torch.allclose(read.value[0], stream(PROMPTS[0], "blocks.2.hook_resid_post")[-1])


def test_at_one_site_lines_keep_their_order() -> None:
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS[:1])
        before = run["resid_post", 1].at(pos=-1).save()
        run["resid_post", 1].at(pos=-1).scale(2.0)
        between = run["resid_post", 1].at(pos=-1).save()
        run["resid_post", 1].at(pos=-1).add(1.0)
        after = run["resid_post", 1].at(pos=-1).save()
    own = stream(PROMPTS[0])[-1:]
    for value, wanted in ((before, own), (between, own * 2), (after, own * 2 + 1)):
        torch.testing.assert_close(value.value, wanted, rtol=0, atol=1e-12)


def test_a_read_is_as_of_its_line_even_if_it_is_used_later() -> None:
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS[:1])
        before = run["resid_post", 1].at(pos=-1)
        run["resid_post", 1].at(pos=-1).scale(2.0)
        doubled = (before * 2).save()
        after = run["resid_post", 1].at(pos=-1).save()
    assert torch.equal(doubled.value, after.value)
    torch.testing.assert_close(after.value, stream(PROMPTS[0])[-1:] * 2, rtol=0, atol=1e-12)


def test_positions_are_the_prompts_own_whatever_it_is_batched_with() -> None:
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS)
        reads = [run["resid_post", 1].at(pos=pos).save() for pos in (0, 2, -1)]
        pattern = run["pattern", 1].at(pos=-1, feature=0).save()
    for pos, read in zip((0, 2, -1), reads, strict=True):
        torch.testing.assert_close(read.value, torch.stack([stream(one)[pos] for one in PROMPTS]), rtol=0, atol=1e-12)
    wanted = torch.stack([stream(one, "blocks.1.attn.hook_pattern")[:, -1, 0] for one in PROMPTS])
    torch.testing.assert_close(pattern.value, wanted, rtol=0, atol=1e-12)


def test_an_edit_of_all_positions_leaves_padding_and_other_runs_alone() -> None:
    with MODEL.trace() as t:
        edited, other = t.prompts(PROMPTS), t.prompts(PROMPTS)
        edited["pattern", 0].replace(0.1)
        found = edited.logits.at(pos=-1).save()
        untouched = other.logits.at(pos=-1).save()

    def replace(x: torch.Tensor, hook: object) -> None:
        x[:] = 0.1

    hooks = [("blocks.0.attn.hook_pattern", replace)]
    wanted = torch.stack([alone(one, fwd_hooks=hooks)[-1] for one in PROMPTS])
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(untouched.value, torch.stack([alone(one)[-1] for one in PROMPTS]), rtol=0, atol=1e-12)


def test_saved_values_are_not_changed_by_later_edits_or_by_the_caller() -> None:
    constant = torch.ones(12, dtype=torch.float64)
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS[:1])
        read = run["resid_post", 1].save()
        kept = t.constant(constant).save()
        constant.zero_()
        run["resid_post", 1].zero()
        run["resid_post", 2].save()
    torch.testing.assert_close(read.value[0], stream(PROMPTS[0]), rtol=0, atol=1e-12)
    assert kept.value.eq(1).all()


def test_the_ways_of_writing_an_edit_are_one() -> None:
    value = torch.linspace(-1, 1, 12, dtype=torch.float64)
    found = []
    for way in range(5):
        with MODEL.trace() as t:
            run = t.prompts(PROMPTS[:1])
            if way == 0:
                run["resid_post", 1].at(pos=-1).add(value)
            elif way == 1:
                run["resid_post", 1][:, -1] += value
            elif way == 2:
                run["resid_post", 1][:, -1] = run["resid_post", 1][:, -1] + value
            elif way == 3:
                run.intervene([Intervention(LAST, "add", value, pos=-1)])
            else:
                part = run["resid_post", 1].at(pos=-1)
                part += value
            run.logits.save("logits")
        assert sum(type(node).__name__ == "Write" for node in t.graph.nodes) == 1
        found.append(t["logits"])
    assert all(torch.equal(one, found[0]) for one in found)
    assert not torch.allclose(found[0][0], alone(PROMPTS[0]))


def test_what_an_edit_left_can_be_put_into_another_run_or_back() -> None:
    with MODEL.trace() as t:
        one, other = t.prompts(PROMPTS[:1]), t.prompts(PROMPTS[:1])
        left = one["resid_post", 0].at(pos=-1).add(1.0)
        other["resid_post", 0][:, -1] = left
        one["resid_post", 0].at(pos=-1).scale(3.0)
        one["resid_post", 0][:, -1] = left
        a, b = one.logits.save(), other.logits.save()
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=1e-12)


def test_a_late_value_goes_into_an_early_layer_of_another_run_in_two_passes() -> None:
    with MODEL.trace() as t:
        source, target = t.prompts(PROMPTS[:1]), t.prompts(PROMPTS[1:2])
        target["resid_post", 0].at(pos=-1).replace(source["resid_post", 2].at(pos=-1))
        late = target.logits.save()
    assert len(t.estimate().passes) == 2
    value = stream(PROMPTS[0], "blocks.2.hook_resid_post")[-1]

    def put(x: torch.Tensor, hook: object) -> None:
        x[:, -1] = value

    wanted = alone(PROMPTS[1], fwd_hooks=[("blocks.0.hook_resid_post", put)])
    torch.testing.assert_close(late.value[0], wanted, rtol=0, atol=1e-12)


def test_twelve_patched_runs_and_their_source_take_one_pass() -> None:
    tokens = tiny_tokens(1, 6)
    with MODEL.trace(together=True) as t:
        clean = t.prompts(tokens)
        outputs = []
        for layer in range(3):
            for pos in range(4):
                run = t.prompts(tiny_tokens(1, 6, seed=2))
                run["resid_post", layer].at(pos=pos).replace(clean["resid_post", layer].at(pos=pos))
                outputs.append(run.logits.at(pos=-1))
        grid = t.stack(outputs).save()
    estimate = t.estimate()
    assert [(one.kind, one.prompts) for one in estimate.passes] == [("pass", 13)]
    assert str(estimate).startswith("1 pass, ")
    assert grid.shape == (12, 1, 20)


def test_a_grid_through_stack_is_a_sweep_and_gives_the_loops_numbers() -> None:
    clean_tokens, corrupted = tiny_tokens(2, 6), tiny_tokens(2, 6, seed=2)
    metric = logit_diff([1, 2], [3, 4])
    with MODEL.trace() as t:
        clean = t.prompts(clean_tokens)

        def patched(layer: int, pos: int) -> Value:
            run = t.prompts(corrupted)
            run["resid_post", layer].at(pos=pos).replace(clean["resid_post", layer].at(pos=pos))
            return run.metric(metric)

        grid = t.stack([t.stack([patched(layer, pos) for pos in range(6)]) for layer in range(3)]).save()
    assert [one.kind for one in t.estimate().passes] == ["pass", "sweep"]
    _, cache = MODEL.run_with_cache(clean_tokens)
    for layer in range(3):
        for pos in range(6):
            cell = Intervention.from_cache(("resid_post", layer), cache, pos=pos)
            with torch.no_grad():
                wanted = metric.per_prompt(MODEL.run(corrupted, interventions=[cell]))
            torch.testing.assert_close(grid.value[layer, pos], wanted, rtol=0, atol=1e-10)


def test_a_hook_of_the_callers_acts_in_the_passes_of_a_trace_and_not_twice() -> None:
    def double(x: torch.Tensor, hook: object) -> torch.Tensor:
        return x * 2

    with MODEL.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", double)]), MODEL.trace() as t:
        found = t.prompts(PROMPTS[:1]).logits.save()
    torch.testing.assert_close(
        found.value[0], alone(PROMPTS[0], fwd_hooks=[("blocks.0.hook_mlp_out", double)]), rtol=0, atol=1e-12
    )


def test_the_logit_lens_the_pieces_of_the_model_and_its_weights() -> None:
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS)
        lens = t.stack([t.logits_of(run["resid_post", layer].at(pos=-1)) for layer in range(3)]).save()
        steps = t.apply("unembed", t.apply("ln_final", run["resid_post", 2].at(pos=-1))).save()
        embedded = t.apply("embed", torch.tensor([[1, 2]])).save()
        weight = t.weight("blocks.0.attn.W_O").save()
    torch.testing.assert_close(lens.value[2], torch.stack([alone(one)[-1] for one in PROMPTS]), rtol=0, atol=1e-12)
    torch.testing.assert_close(steps.value, lens.value[2], rtol=0, atol=1e-12)
    assert torch.equal(embedded.value[0], MODEL.embed.W_E[[1, 2]])
    assert torch.equal(weight.value, MODEL.blocks[0].attn.W_O)
    assert weight.value.data_ptr() != MODEL.blocks[0].attn.W_O.data_ptr()


def test_nothing_runs_that_nothing_saved_needs() -> None:
    calls: list[str] = []

    def count(x: torch.Tensor, hook: object) -> None:
        calls.append(hook.name)  # type: ignore[attr-defined]

    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    with MODEL.hooks(fwd_hooks=[(names, count)]), MODEL.trace() as t:
        t.prompts(PROMPTS[:1])["resid_post", 0].save()
        t.prompts(PROMPTS[1:2])["resid_post", 2].mean()
    assert calls == names[:1]


# What is refused


def refused(record: Any, message: str) -> TraceError:
    trace = MODEL.trace(run=False)
    with pytest.raises(TraceError, match=message) as caught:
        record(trace, trace.prompts(PROMPTS[:1]))
    return caught.value


REFUSED: list[tuple[Any, str]] = [
    (lambda t, run: run["resid_pots", 1], "unknown activation 'resid_pots'"),
    (lambda t, run: run["resid_post", 7], "layers run 0-2"),
    (lambda t, run: run["resid_post", 1].at(pos=5), "pos 5 .*there are 5 there"),
    (lambda t, run: run["resid_post", 1].at(head=0), "there is no head to select"),
    (lambda t, run: run["resid_post", 1].at(poss=0), "no selection 'poss'"),
    (lambda t, run: run["resid_post", 1].at(pos=0).at(pos=1), "selected already"),
    (lambda t, run: run["resid_post", 1].at(pos=[0, -5]), "twice"),
    (lambda t, run: run["resid_post", 1].at(step=1), "only a generation"),
    (lambda t, run: run["resid_post", 1].add(torch.ones(7)), "does not broadcast"),
    (lambda t, run: run["resid_post", 1].write("double", 1.0), "an edit is one of"),
    (lambda t, run: run["resid_post", 1] + torch.ones(7), "do not broadcast"),
    (lambda t, run: run["resid_post", 1] @ torch.ones(7, 2), "matmul takes"),
    (lambda t, run: run["resid_post", 1].mean("head"), "no axis 'head'"),
    (lambda t, run: run.metric(lambda logits: logits.mean()), "metric of hooked_lm.metrics"),
    (lambda t, run: run.metric(log_prob(99)), "vocabulary is 0-19"),
    (lambda t, run: run.metric(log_prob([1, 2])), "answers for 2 prompts"),
    (lambda t, run: t.gradient(run["resid_post", 1], of=run["resid_post", 0]), "one number"),
    (lambda t, run: t.gradient(run.logits.sum(), of=run.logits + 1), "activation that a run"),
    (lambda t, run: t.logits_of(torch.ones(3)), "takes a stream"),
    (lambda t, run: t.apply("mlp", run["resid_post", 1]), "a piece of the model is one of"),
    (lambda t, run: t.weight("blocks.0.nothing"), "no parameter"),
    (lambda t, run: t.prompts([[1] * 99]), "n_ctx"),
    (lambda t, run: t.prompts([[99]]), "tokens|vocabulary"),
    (lambda t, run: t.prompts("text"), "tokenizer"),
    (lambda t, run: t.op("eval", run.logits), "no operation 'eval'"),
    (lambda t, run: t.constant("one"), "an operand is"),
    (lambda t, run: t.constant(MODEL.trace(run=False).constant(1.0)), "belongs to another trace"),
    (lambda t, run: run.intervene(["zero"]), "an intervention is an Intervention"),
    (lambda t, run: run["tokens"].add(0.5), "holds int entries"),
    (lambda t, run: t.prompts(PROMPTS)["resid_post", 1].save(), "select some of them"),
    (lambda t, run: [run.logits.save("a"), run["resid_post", 1].save("a")], "saved already"),
    (lambda t, run: t.generate(PROMPTS, 99), "there is room for"),
    (lambda t, run: run.generated, "generates nothing"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_on_the_line_that_records_it(record: Any, message: str) -> None:
    error = refused(record, message)
    assert error.line is None or error.line.startswith("test_recording.py:")


def test_the_error_names_the_callers_line() -> None:
    error = refused(lambda t, run: run["resid_post", 1] + torch.ones(7), "do not broadcast")
    assert error.line is not None
    assert f"(recorded at {error.line})" in str(error)


def test_an_edit_by_a_later_value_of_the_same_run_names_both_sites() -> None:
    trace = MODEL.trace(run=False)
    run = trace.prompts(PROMPTS[:1])
    run["resid_post", 0].add(run["resid_post", 2].at(pos=-1).mean())
    run.logits.save()
    with pytest.raises(TraceError, match=r"'blocks.0.hook_resid_post' uses 'blocks.2.hook_resid_post' of the same run"):
        trace.run()


def test_values_that_go_around_in_a_circle_are_refused() -> None:
    trace = MODEL.trace(run=False)
    one, other = trace.prompts(PROMPTS[:1]), trace.prompts(PROMPTS[:1])
    one["resid_post", 0].replace(other["resid_post", 2])
    other["resid_post", 1].replace(one["resid_post", 1])
    one.logits.save()
    with pytest.raises(TraceError, match="no order of passes serves both"):
        trace.run()


def test_values_may_go_both_ways_between_runs_of_one_pass() -> None:
    with MODEL.trace() as t:
        one, other = t.prompts(PROMPTS[:1]), t.prompts(PROMPTS[:1])
        other["resid_post", 1].replace(one["resid_post", 0])
        one["resid_post", 2].replace(other["resid_post", 1])
        found = one.logits.save()
    assert len(t.estimate().passes) == 1
    early = stream(PROMPTS[0], "blocks.0.hook_resid_post")

    def put(x: torch.Tensor, hook: object) -> torch.Tensor:
        return early[None]

    wanted = alone(PROMPTS[0], fwd_hooks=[("blocks.2.hook_resid_post", put)])
    torch.testing.assert_close(found.value[0], wanted, rtol=0, atol=1e-12)


def test_a_trace_runs_once_and_an_error_in_its_block_runs_nothing() -> None:
    with MODEL.trace() as t:
        value = t.prompts(PROMPTS[:1]).logits.save()
    for use in (t.run, lambda: t.prompts([[1]]), value.save, lambda: value + 1):
        with pytest.raises(TraceError, match=r"has run: .* compute on the \.value of what was saved"):
            use()
    with pytest.raises(TraceError, match=r"call run\(\) only after model\.trace\(run=False\)"):
        t.__exit__(None, None, None)  # the end of a block in which it was run already
    trace = MODEL.trace()
    kept = trace.prompts(PROMPTS[:1]).logits.save()
    trace.__exit__(RuntimeError, RuntimeError("an error in the block"), None)
    with pytest.raises(TraceError, match="has not run"):
        _ = kept.value
    with pytest.raises(TraceError, match="saves nothing"):
        MODEL.trace().run()


def test_a_metric_of_the_callers_own_scores_a_run() -> None:
    metric = Metric("half", -1, torch.tensor([[3]]), lambda read: read[..., 0] / 2)
    with MODEL.trace() as t:
        run = t.prompts(PROMPTS)
        found = run.metric(metric).save()
    wanted = torch.stack([alone(one)[-1, 3] / 2 for one in PROMPTS])
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-12)


def test_kl_to_reads_the_reference_at_its_position() -> None:
    reference = torch.randn(1, 4, 20, dtype=torch.float64)
    with MODEL.trace() as t:
        found = t.prompts([PROMPTS[2]]).metric(kl_to(reference)).save()
    wanted = kl_to(reference).per_prompt(alone(PROMPTS[2])[None])
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-12)


def test_functions_of_torch_say_what_to_use_and_operators_of_tensors_work() -> None:
    model = tiny_model()
    with model.trace(run=False) as t:
        x = t.prompts([[1, 2, 3]])["resid_post", 0].at(pos=-1)
        for call in (
            lambda: torch.softmax(x, -1),
            lambda: torch.stack([x, x]),
            lambda: torch.where(x > 0, x, 0.0),
            lambda: torch.einsum("bd,bd->b", x, x),
            lambda: torch.nn.functional.relu(x),
        ):
            with pytest.raises(TraceError, match=r"torch\.\w+ takes tensors.*tracing\.OPS"):
                call()
        ones = torch.ones(12, dtype=torch.float64)
        for made in (ones + x, ones - x, ones * x, ones / x, ones < x, ones == x):
            assert made.shape == (1, 12)


def test_the_sizes_of_a_draw_may_stand_one_by_one_or_in_a_list() -> None:
    with MODEL.trace() as t:
        drawn = [t.randn(*sizes, seed=3).save() for sizes in ((2, 3), ([2, 3],), (torch.Size([2, 3]),))]
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(one.value, expected) for one in drawn)
