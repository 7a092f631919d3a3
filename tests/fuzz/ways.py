"""Ways of computing an activation, a logit, a text or a score, each compared with the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_lm import ActivationCache, HookedTransformer, HookPoint, metrics
from hooked_lm.interventions import Intervention, load_interventions, save_interventions
from hooked_lm.names import selected_axis
from hooked_lm.patching import get_act_patch
from hooked_lm.sweep import sweep
from tests.fuzz.batch import Batch
from tests.fuzz.case import Case, assert_close
from tests.fuzz.edits import Passes
from tests.fuzz.reference import COPIES

WAYS: dict[str, Callable[[Case], None]] = {}


def way(check: Callable[[Case], None]) -> Callable[[Case], None]:
    WAYS[check.__name__] = check
    return check


def options_of(batch: Batch) -> dict[str, Any]:
    return {"attention_mask": batch.mask} if batch.padded else {}


def draw_kept(case: Case, length: int) -> tuple[int | slice | Tensor | None, list[int]]:
    """Draw `logits_to_keep`, and return with it the positions that it keeps."""
    rng = case.rng
    kinds: list[int | slice | Tensor | None] = [
        None,
        rng.randint(1, length),
        slice(rng.randrange(length), None),
        torch.tensor(rng.sample(range(length), rng.randint(1, length))),
    ]
    keep = rng.choice(kinds)
    positions = list(range(length))
    if keep is None:
        return None, positions
    if isinstance(keep, int):
        return keep, positions[-keep:]
    return keep, positions[keep] if isinstance(keep, slice) else keep.tolist()


def draw_slice(case: Case, candidates: list[int], length: int) -> tuple[Any, list[int]]:
    """Draw a `pos_slice` among some positions, and return with it the positions it selects."""
    rng = case.rng
    picked = rng.sample(candidates, rng.randint(1, len(candidates)))
    if rng.random() < 0.3:
        return picked[0] - length if rng.random() < 0.5 else picked[0], picked[:1]
    return [one - length if rng.random() < 0.3 else one for one in picked], picked


# Activations


@way
def observed_under_edits(case: Case) -> None:
    """Every edit, and any choice of other sites observed, in a cache of any kind."""
    batch = case.batch()
    keep, kept = draw_kept(case, batch.length)
    edits = case.edits(batch, kept=kept)
    rows = case.rows(batch, edits)
    assert set(rows[0]) == set(case.model.hook_dict)
    names = case.some_names(list(rows[0]))
    if any(".ln1." in one.site for one in edits):
        # A lazy cache refuses edits of a norm together with edits of what single heads read through it.
        kind = case.rng.choice(["", "offload"])
    else:
        kind = case.rng.choice(["", "offload", "lazy"])
    pos_slice, sliced = draw_slice(case, kept, batch.length) if case.rng.random() < 0.3 else (None, [])
    if pos_slice is not None:
        names = [name for name in names if selected_axis(case.axes[name], "pos") is not None] or ["hook_embed"]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        how: dict[str, Any] = {"lazy": True} if kind == "lazy" else {}
        if kind == "offload":
            how["offload"] = Path(folder) / "cache.safetensors"
        with case.model.intervening(edits):
            logits, cache = case.model.run_with_cache(
                batch.tokens, names_filter=names, logits_to_keep=keep, pos_slice=pos_slice, **how, **options_of(batch)
            )
        whole, real = case.together(batch, rows, "unembed.hook_out")
        assert_close(logits, whole[:, kept], f"{kind} logits", real[:, kept])
        compare_cache(case, batch, rows, names, cache, kept, sliced)


def compare_cache(
    case: Case,
    batch: Batch,
    rows: list[dict[str, Tensor]],
    names: list[str],
    cache: ActivationCache,
    kept: list[int],
    sliced: list[int],
) -> None:
    for name in case.rng.sample(names, len(names)):
        expected, real = case.together(batch, rows, name)
        axis = selected_axis(case.axes[name], "pos")
        positions = sliced or (kept if name.startswith("unembed.") else None)
        if positions is not None and axis is not None:
            expected, real = (one.index_select(axis, torch.tensor(positions)) for one in (expected, real))
        assert_close(cache[name], expected, name, real)


@way
def hooks_in_place_and_returned(case: Case) -> None:
    """Edits as plain functions that write to their argument, beside observers, a nested run and another thread."""
    batch, other = case.batch(), case.batch()
    edits = case.edits(batch, most=2)
    rows = case.rows(batch, edits)
    seen: dict[str, Tensor] = {}
    nested: list[Tensor] = []
    busy: list[bool] = []

    def edit_of(one: Intervention) -> Callable[[Tensor, HookPoint], Tensor | None]:
        def edit(x: Tensor, hook: HookPoint) -> Tensor | None:
            changed, _ = one.apply(x, hook.axes)
            if in_place:
                x.copy_(changed)
                return None
            return changed

        in_place = case.rng.random() < 0.5
        return edit

    def observe(x: Tensor, hook: HookPoint) -> None:
        if busy != [True]:
            # A tensor that a reading hook keeps is not written to later.
            seen[hook.name] = x if kept_as_it_is else x.clone()

    # A function that may edit acts on the norm of every edited copy of the stream too; one that only reads does not.
    copies_edited = any(one.site.endswith(COPIES) for one in edits)
    kept_as_it_is = case.rng.random() < 0.5
    observe.reads_only = copies_edited or kept_as_it_is  # type: ignore[attr-defined]
    inner = case.edits(other, most=1)

    def run_again(x: Tensor, hook: HookPoint) -> None:
        if busy:
            return
        busy.append(True)
        nested.append(case.model.run(other.tokens, interventions=inner, **options_of(other)))
        busy.append(False)

    observed = case.some_names(list(case.model.hook_dict))
    hooks: list[tuple[str, Any]] = [(one.site, edit_of(one)) for one in edits] + [(name, observe) for name in observed]
    if case.rng.random() < 0.5 and not edits:
        hooks.append((case.rng.choice(list(case.model.hook_dict)), run_again))
    with torch.no_grad():
        logits = case.model.run_with_hooks(batch.tokens, fwd_hooks=hooks, **options_of(batch))
    expected, real = case.together(batch, rows, "unembed.hook_out")
    assert_close(logits, expected, "logits", real)
    for name in observed:
        expected, real = case.together(batch, rows, name)
        assert_close(seen[name], expected, name, real)
    if nested:
        expected, real = case.together(other, case.rows(other, inner), "unembed.hook_out")
        assert_close(nested[0], expected, "the nested run", real)


@way
def two_threads(case: Case) -> None:
    """Two threads run one model under different edits, at the same time."""
    batches = [case.batch(), case.batch()]
    edits = [case.edits(batch) for batch in batches]

    @torch.no_grad()
    def run(which: int) -> Tensor:
        batch = batches[which]
        for _ in range(3):
            logits = case.model.run(batch.tokens, interventions=edits[which], **options_of(batch))
        return logits

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    for batch, some, logits in zip(batches, edits, found, strict=True):
        expected, real = case.together(batch, case.rows(batch, some), "unembed.hook_out")
        assert_close(logits, expected, "logits in a thread", real)


@way
def gradients(case: Case) -> None:
    """The gradient of a score at any sites, in a cache."""
    batch = case.batch()
    copied = ("attn_in", "_input")
    edits = case.edits(batch, most=1, allowed=lambda name: not name.endswith(("hook_tokens", *copied)))
    differentiable = [
        name
        for name, point in case.model.hook_dict.items()
        if not name.endswith(("hook_tokens", "hook_expert_indices", *copied)) and point.differentiable
    ]
    names = case.some_names(differentiable)
    rows = case.rows(batch, edits, head_copies=False, graph=True)
    direction = torch.randn(case.model.cfg.d_vocab_out, dtype=torch.float64)

    def score(logits: Tensor, real: Tensor) -> Tensor:
        return (torch.where(real, logits, 0) @ direction).square().sum()

    logits, real = case.together(batch, rows, "unembed.hook_out")
    leaves = {name: [row[name] for row in rows] for name in names}
    case_score = score(logits, real)
    grads = {
        name: torch.autograd.grad(case_score, those, retain_graph=True, allow_unused=True)
        for name, those in leaves.items()
        if all(one.requires_grad for one in those)
    }
    found: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: HookPoint) -> None:
        found[hook.name] = gradient.clone()

    with case.model.hooks(bwd_hooks=[(names, keep)]), case.model.intervening(edits):
        score(case.model(batch.tokens, **options_of(batch)), real).backward()
    case.model.zero_grad()
    for name, parts in grads.items():
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves[name], parts, strict=True)]
        expected, there = batch.together(filled, case.axes[name])
        if name in found:
            assert_close(found[name], expected, f"gradient at {name}", there)
        else:
            assert not bool(expected.any()), f"no gradient came to {name}"


# Text


@way
def chunks_through_a_key_value_cache(case: Case) -> None:
    """A text read in pieces through a key-value cache, under edits."""
    if not case.causal:
        return
    batch = case.batch(left_only=True)
    # Padding is said with the first piece, which has a real token of every prompt.
    candidates = range(max(batch.starts) + 1, batch.length)
    cuts = sorted(case.rng.sample(candidates, min(case.rng.randint(0, 3), len(candidates))))
    passes: Passes = tuple(zip([0, *cuts], [*cuts, batch.length], strict=True))
    lengths = [end - start for start, end in zip(batch.starts, batch.ends, strict=True)]
    if case.model.cfg.rotation_changes(1, max(lengths)):
        return  # such a model refuses: what is in the cache would turn anew
    edits = case.edits(batch, from_end=case.rng.random() < 0.3 and len(passes) == 1)
    edits = [one for one in edits if fits_every_pass(one, passes, case)]
    past = case.model.new_kv_cache(len(batch.tokens))
    parts = []
    with torch.no_grad(), case.model.intervening(edits):
        for start, stop in passes:
            mask = {"attention_mask": batch.mask[:, start:stop]} if batch.padded and start == 0 else {}
            parts.append(case.model(batch.tokens[:, start:stop], past_kv_cache=past, **mask))
    expected, real = case.together(batch, case.rows(batch, edits, passes), "unembed.hook_out")
    assert_close(torch.cat(parts, 1), expected, f"logits in passes {passes}", real)


def fits_every_pass(edit: Intervention, passes: Passes, case: Case) -> bool:
    """Return whether an edit's entries are in every pass: a pass has scores and patterns for the keys up to its end."""
    if "key" not in case.axes[edit.site] or edit.feature is None:
        return True
    features = edit.feature if isinstance(edit.feature, tuple) else (edit.feature,)
    return all(-passes[0][1] <= one < passes[0][1] for one in features)


@way
def generation_with_and_without_the_cache(case: Case) -> None:
    """Greedy text, under edits, with a key-value cache and without."""
    if not case.causal or case.model.cfg.d_vocab_out != case.d_vocab:
        return
    batch = case.batch(left_only=True, longest=6, alone=0.7)
    n_new, first = case.rng.randint(1, 4), batch.length
    edits = case.edits(batch, most=2, kept=[first - 1])
    edits = [one for one in edits if same_sign(one) and fits_every_pass(one, ((0, first),), case)]
    text, ends = batch.tokens, batch.ends
    for _ in range(n_new):
        passes: Passes = ((0, first), *((one, one + 1) for one in range(first, text.shape[1])))
        logits = case.logits(Batch(text, batch.starts, ends), edits, passes)[:, -1]
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), 1)
        ends = tuple(end + 1 for end in ends)
    how: dict[str, Any] = {"max_new_tokens": n_new, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for use_past_kv_cache in (True, False):
        found = case.model.generate(
            batch.tokens, interventions=edits, use_past_kv_cache=use_past_kv_cache, **how, **options_of(batch)
        )
        assert torch.equal(found, text), f"use_past_kv_cache={use_past_kv_cache}: {found} is not {text}; {edits}"


def same_sign(edit: Intervention) -> bool:
    """Return whether no two of an edit's positions can be one: all count from the start, or there is but one."""
    return not isinstance(edit.pos, tuple) or len(edit.pos) == 1 or all(one >= 0 for one in edit.pos)


# Scores


def draw_metric(case: Case, batch: Batch) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Return a metric, and what it is of the reference's logits. Both read real positions only."""
    d_vocab, n = case.model.cfg.d_vocab_out, len(batch.tokens)
    a, b = case.rng.randrange(d_vocab), case.rng.randrange(d_vocab)
    rows, lasts = torch.arange(n), torch.tensor(batch.ends) - 1
    real = batch.mask.bool()

    def reads_last(logits: Tensor) -> Tensor:
        return (logits[rows, lasts, a] - logits[rows, lasts, b]).mean()

    def reads_all(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[..., a][real].mean()

    def writes(logits: Tensor) -> Tensor:
        logits -= logits.mean(-1, keepdim=True)
        logits[..., b] *= 2.0
        return (logits[..., a] + logits[..., b])[real].mean()

    def branches(logits: Tensor) -> Tensor:
        largest = logits[rows, lasts].max(-1).values
        return largest.mean() if bool(logits[0, int(lasts[0]), a] > 0) else logits[rows, lasts, b].mean()

    functions: list[Any] = [reads_last, reads_all, writes, branches]
    if not batch.padded and a != b:
        functions.append(metrics.logit_diff(a, b, pos=case.rng.randrange(batch.length) - batch.length))
        functions.append(metrics.log_prob(a))
    metric = case.rng.choice(functions)
    return metric, lambda logits: metric(logits.clone())


@way
def scores_of_a_sweep(case: Case) -> None:
    """Scores of many edits, by the batched incremental forward or run by run."""
    batch = case.batch(longest=7)
    metric, of_reference = draw_metric(case, batch)
    cells = [case.edits(batch, most=2) for _ in range(case.rng.randint(1, 6))]
    if case.rng.random() < 0.5:
        # A cell that changes nothing, as where clean and corrupted prompts are alike.
        nothing = [
            replace(one, operation="scale", value=1) for one in case.edits(batch, most=1) if one.value is not None
        ]
        cells.insert(case.rng.randrange(len(cells) + 1), nothing)
    expected = torch.stack([of_reference(case.logits(batch, cell)) for cell in cells])
    incremental = case.rng.random() < 0.8
    budget = case.rng.choice([1, 10_000, 2**30])
    found = sweep(
        case.model,
        batch.tokens,
        cells,
        metric,
        incremental=incremental,
        memory_budget=budget,
        verbose=False,
        **options_of(batch),
    )
    assert_close(found, expected, f"scores of {cells}")


GRIDS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn_head_out_by_pos": "attn.hook_z",
    "attn_head_v_by_pos": "attn.hook_v",
    "attn_head_out_all_pos": "attn.hook_z",
    "attn_head_pattern_all_pos": "attn.hook_pattern",
}


@way
def grids_of_activation_patching(case: Case) -> None:
    """A classic grid, with a cache or prompts as the clean side, and any metric."""
    cfg = case.model.cfg
    name = case.rng.choice([one for one in GRIDS if not (cfg.attn_only and "mlp" in one)])
    if "head_v" in name and cfg.n_kv_heads != cfg.n_heads:
        return
    corrupted = case.batch(longest=5, alone=1.0)
    clean = Batch(case.rng_tokens(corrupted.tokens.shape), corrupted.starts, corrupted.ends)
    metric, of_reference = draw_metric(case, corrupted)
    rows = case.rows(clean)
    expected = []
    for layer in range(cfg.n_layers):
        site = f"blocks.{layer}.{GRIDS[name]}"
        value, _ = case.together(clean, rows, site)
        for cell in cells_of(name, site, value, corrupted.length, cfg.n_heads):
            expected.append(of_reference(case.logits(corrupted, [cell])))
    with torch.no_grad():
        side = clean.tokens if case.rng.random() < 0.5 else case.model.run_with_cache(clean.tokens)[1]
    found = get_act_patch(name, case.model, corrupted.tokens, side, metric, verbose=False)
    assert_close(found.flatten(), torch.stack(expected), f"grid {name}")


def cells_of(name: str, site: str, value: Tensor, length: int, n_heads: int) -> list[Intervention]:
    """Return the cells of one layer of a grid, in the order of its axes."""
    if "head" not in name:
        return [Intervention(site, "replace", value[:, pos], pos=pos) for pos in range(length)]
    if "pattern" in name:
        return [Intervention(site, "replace", value[:, head], head=head) for head in range(n_heads)]
    if name.endswith("all_pos"):
        return [Intervention(site, "replace", value[:, :, head], head=head) for head in range(n_heads)]
    return [
        Intervention(site, "replace", value[:, pos, head], pos=pos, head=head)
        for pos in range(length)
        for head in range(n_heads)
    ]


# Files


@way
def saved_and_loaded(case: Case) -> None:
    """A model and edits that go through files."""
    batch = case.batch()
    edits = case.edits(batch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        case.model.save_pretrained(Path(folder) / "model")
        loaded = HookedTransformer.from_pretrained_no_processing(str(Path(folder) / "model"))
        save_interventions(Path(folder) / "edits.json", edits)
        again: Any = load_interventions(Path(folder) / "edits.json")
        logits = loaded.run(batch.tokens, interventions=again, **options_of(batch))
    expected, real = case.together(batch, case.rows(batch, edits), "unembed.hook_out")
    assert_close(logits, expected, "logits of the loaded model", real)
