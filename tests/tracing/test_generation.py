"""Generations in a trace: reads and edits by step, against the whole text run again at every step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer
from hooked_lm.tracing import TraceError
from tests.tracing.draw import CONFIGS, model_of

N_STEPS = 4
Edit = tuple[str, list[int] | None, str]


def edited_at_newest(steps: list[int] | None, how: str, n_prompt: int, step: int) -> Callable[..., Tensor]:
    """The edits of all steps so far, each at the position that its step read, and with the keys that it had."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        by_query = "query" in hook.axes
        for k in range(step + 1):
            if steps is None or k in steps:
                at = n_prompt - 1 + k
                before = x[:, :, at] if by_query else x[:, at]
                after = before + 0.5 if how == "add" else before * 0.5 if how == "scale" else torch.zeros_like(before)
                if by_query:
                    x[:, :, at, : at + 1] = after[..., : at + 1]
                else:
                    x[:, at] = after
        return x

    return edit


def by_hand(
    model: HookedTransformer, prompts: list[list[int]], edits: list[Edit], reads: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The generated tokens [batch step], and each read at the newest position [step batch ...]."""
    tokens, parts = [], {site: [] for site in reads}  # type: ignore[var-annotated]
    for prompt in prompts:
        text = list(prompt)
        of_prompt: dict[str, list[Tensor]] = {site: [] for site in reads}
        for step in range(N_STEPS):
            seen: dict[str, Tensor] = {}
            hooks: list[Any] = [(site, edited_at_newest(steps, how, len(prompt), step)) for site, steps, how in edits]
            hooks += [(site, lambda x, hook, seen=seen: seen.__setitem__(hook.name, x)) for site in reads]
            with torch.no_grad():
                logits = model.run_with_hooks(torch.tensor([text]), prepend_bos=False, fwd_hooks=hooks)
            for site in reads:
                by_query = "query" in model.hook_dict[site].axes
                of_prompt[site].append(seen[site][0, :, -1, 0] if by_query else seen[site][0, -1])
            text.append(int(logits[0, -1].argmax()))
        tokens.append(text[len(prompt) :])
        for site in reads:
            parts[site].append(torch.stack(of_prompt[site]))
    return torch.tensor(tokens), {site: torch.stack(one, 1) for site, one in parts.items()}


def drawn(which: int, seed: int) -> tuple[HookedTransformer, list[list[int]], list[Edit], list[str]]:
    model, generator = model_of(which), random.Random(seed)
    prompts = [
        [generator.randrange(20) for _ in range(generator.randint(2, 5))] for _ in range(generator.randint(1, 3))
    ]
    sites = [
        name
        for name, point in model.hook_dict.items()
        if {"pos", "query"} & set(point.axes) and not name.endswith(("tokens", "indices"))
    ]
    edits: list[Edit] = []
    for _ in range(generator.randint(0, 2)):
        site = generator.choice(sites)
        how = generator.choice(["add", "scale"] if site.endswith("scale") else ["add", "scale", "zero"])
        edits.append((site, generator.choice([None, [0], [1, 3], [2]]), how))
    return model, prompts, edits, generator.sample(sites, 3)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("which", range(len(CONFIGS)))
@pytest.mark.parametrize("seed", range(5))
def test_reads_and_edits_by_step_are_those_of_the_whole_text_run_again(which: int, seed: int, cached: bool) -> None:
    model, prompts, edits, reads = drawn(which, seed)
    with model.trace() as t:
        gen = t.generate(prompts, N_STEPS, use_past_kv_cache=cached)
        for site, steps, how in edits:
            part = gen[site].at(pos=-1, step=steps)
            part.zero() if how == "zero" else part.write(how, 0.5)  # type: ignore[arg-type]
        values = {
            site: gen[site].at(pos=-1, **({"feature": 0} if "key" in model.hook_dict[site].axes else {})).save()
            for site in reads
        }
        tokens = gen.generated.save()
    wanted, parts = by_hand(model, prompts, edits, reads)
    assert torch.equal(tokens.value, wanted)
    for site in reads:
        assert values[site].axes[:2] == ("step", "batch")
        torch.testing.assert_close(values[site].value, parts[site], rtol=0, atol=1e-10)


def test_one_step_drops_its_axis_and_step_0_has_all_positions_of_the_prompt() -> None:
    model = model_of(0)
    with model.trace() as t:
        gen = t.generate([[1, 2, 3]], 3)
        first = gen["resid_post", 1].at(step=0).save()
        middle = gen["resid_post", 1].at(step=0, pos=1).save()
        second = gen["resid_post", 1].at(step=1, pos=-1).save()
        several = gen["resid_post", 1].at(step=[2, 0], pos=-1).save()
        every = gen["resid_post", 1].at(pos=-1).save()
    assert (first.shape, middle.shape, second.shape, several.shape) == ((1, 3, 12), (1, 12), (1, 12), (2, 1, 12))
    assert torch.equal(first.value[:, 1], middle.value)
    assert torch.equal(every.value[1], second.value)
    assert torch.equal(several.value, every.value[[2, 0]])


def test_an_edit_may_have_a_value_for_each_step_and_come_from_another_run() -> None:
    model = model_of(0)
    values = torch.randn(3, 1, 12, dtype=torch.float64)
    with model.trace() as t:
        source = t.prompts([[4, 5, 6]])
        one, other = t.generate([[1, 2, 3]], 3), t.generate([[1, 2, 3]], 3)
        one["resid_post", 0].at(pos=-1).add(values)
        for step in range(3):
            other["resid_post", 0].at(pos=-1, step=step).add(values[step])
        for gen in (one, other):
            gen["resid_post", 1].at(pos=-1, step=2).replace(source["resid_post", 2].at(pos=-1))
        found = [gen.logits.at(pos=-1).save() for gen in (one, other)]
    torch.testing.assert_close(found[0].value, found[1].value, rtol=0, atol=1e-12)


def test_a_text_that_ends_goes_on_with_its_end_and_every_step_is_made() -> None:
    model = model_of(0)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    free, _ = by_hand(model, prompts, [], [])
    end = int(free[0, 1])
    with model.trace() as t:
        gen = t.generate(prompts, N_STEPS, eos_token_id=end)
        tokens, states = gen.generated.save(), gen["resid_post", 2].at(pos=-1).save()
    assert tokens.value[0].tolist()[2:] == [end, end]
    assert states.shape == (N_STEPS, 2, 12)
    assert torch.isfinite(states.value).all()
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([prompts[0]]), N_STEPS, do_sample=False, eos_token_id=end, verbose=False, prepend_bos=False
        )
    assert wanted[0, 3:].tolist() == tokens.value[0].tolist()[: wanted.shape[1] - 3]


def test_a_seed_decides_the_draws_and_leaves_the_global_generator_alone() -> None:
    model = model_of(0)

    def run(seed: int) -> Tensor:
        with model.trace() as t:
            tokens = t.generate([[1, 2, 3]], 8, do_sample=True, temperature=5.0, seed=seed).generated.save()
        return tokens.value

    state = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda t, gen: gen["resid_post", 1].save(), "select some of them"),
        (lambda t, gen: gen["resid_post", 1].at(pos=0), "reads one position, pos=-1"),
        (lambda t, gen: gen["resid_post", 1].at(pos=-1, step=9), "step 9"),
        (lambda t, gen: gen["pattern", 1].at(pos=-1).save(), "select some of them"),
        (lambda t, gen: t.gradient(gen.logits.at(pos=-1).sum(), of=gen["resid_post", 0].at(pos=-1)), "no gradients"),
        (lambda t, gen: t.generate([[1]], 0), "there is room for"),
        (lambda t, gen: t.generate([[1]], 2, temperature=-1.0), "temperature"),
        (lambda t, gen: t.generate([[1]], 2, eos_token_id=99), "eos_token_id"),
    ],
)
def test_what_a_generation_cannot_give_is_refused_as_it_is_written(use: Any, message: str) -> None:
    trace = model_of(0).trace(run=False)
    with pytest.raises(TraceError, match=message):
        use(trace, trace.generate([[1, 2, 3]], 3))


def test_an_edit_of_a_step_cannot_use_a_later_step() -> None:
    trace = model_of(0).trace(run=False)
    gen = trace.generate([[1, 2, 3]], 3)
    gen["resid_post", 0].at(pos=-1, step=0).add(gen["resid_post", 0].at(pos=-1, step=1))
    gen.generated.save()
    with pytest.raises(TraceError, match="comes later"):
        trace.run()
    with model_of(0).trace() as t:
        gen = t.generate([[1, 2, 3]], 3)
        early = gen["resid_post", 2].at(pos=-1, step=0)
        gen["resid_post", 0].at(pos=-1, step=1).replace(early)
        seen, put = early.save(), gen["resid_post", 0].at(pos=-1, step=1).save()
    assert torch.equal(seen.value, put.value)
