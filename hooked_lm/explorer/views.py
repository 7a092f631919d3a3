"""What the explorer computes, each as one trace: a model of this process and one on a server are asked alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hooked_lm import metrics
from hooked_lm._support.plain_data import PlainData
from hooked_lm.explorer.prompts import MOST_TOKENS, ExplorableModel, Request, example_prompts, spelled
from hooked_lm.tracing import Run, Trace, Value

__all__ = ["VIEWS", "card"]

# Tokens of a list of probabilities, and of a cell of the lens.
_TOP, _IN_CELL = 10, 5
_MOST_CELLS = 4096
_LONGEST = 40  # tokens of a continuation
View = Callable[[ExplorableModel, PlainData], PlainData]


def card(model: ExplorableModel, name: str, load: str) -> PlainData:
    """Return what the page says of a model.

    Args:
        model: the model.
        name: to show.
        load: the Python that loads it.
    """
    cfg = model.cfg
    return {
        "name": name,
        "load": load,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "d_model": cfg.d_model,
        "d_vocab": cfg.d_vocab,
        "n_ctx": cfg.n_ctx,
        "most_tokens": min(MOST_TOKENS, cfg.n_ctx),
        "attn_only": cfg.attn_only,
        "reads_text": model.tokenizer is not None,
        "examples": example_prompts(model),
    }


def run(model: ExplorableModel, fields: PlainData) -> PlainData:
    """The tokens of a prompt, and the likeliest next tokens at each position."""
    tokens = Request(model, fields).tokens()
    with model.trace() as t:
        logits = t.prompts(torch.tensor([tokens])).logits
        probabilities, likeliest = logits.softmax("vocab").topk(min(_TOP, model.cfg.d_vocab_out))
        probabilities.save("probabilities")
        likeliest.save("tokens")
    found = t["tokens"][0].tolist()
    return {
        "tokens": [{"id": token, "text": text} for token, text in zip(tokens, spelled(model, tokens), strict=True)],
        "next": [
            _listed(model, row, values) for row, values in zip(found, t["probabilities"][0].tolist(), strict=True)
        ],
    }


def attention(model: ExplorableModel, fields: PlainData) -> PlainData:
    """The attention pattern of every head, [layer head query key], in thousandths."""
    tokens = Request(model, fields).tokens()
    with model.trace() as t:
        read = t.prompts(torch.tensor([tokens]))
        for layer in range(model.cfg.n_layers):
            read["pattern", layer].save(str(layer))
    return {"patterns": [(1000 * t[str(layer)][0]).round().int().tolist() for layer in range(model.cfg.n_layers)]}


def lens(model: ExplorableModel, fields: PlainData) -> PlainData:
    """The likeliest tokens that the unembedding reads from the stream before each layer and at the end."""
    tokens, n_layers = Request(model, fields).tokens(), model.cfg.n_layers
    sites = [*((f"before layer {layer}", ("resid_pre", layer)) for layer in range(n_layers))]
    sites.append(("at the end", ("resid_post", n_layers - 1)))
    with model.trace() as t:
        read = t.prompts(torch.tensor([tokens]))
        for name, site in sites:
            probabilities, likeliest = t.logits_of(read[site]).softmax("vocab").topk(_IN_CELL)
            probabilities.save(f"{name} probabilities")
            likeliest.save(name)
    return {
        "sites": [name for name, _ in sites],
        "cells": [
            [
                _listed(model, row, values)
                for row, values in zip(t[name][0].tolist(), t[f"{name} probabilities"][0].tolist(), strict=True)
            ]
            for name, _ in sites
        ],
    }


def attribute(model: ExplorableModel, fields: PlainData) -> PlainData:
    """What each head, MLP and embedding adds to the logit of an answer, through the final norm's scale as it is."""
    request = Request(model, fields)
    tokens, cfg = request.tokens(), model.cfg
    pos, answer = request.position(len(tokens)), request.answer("answer")
    by_head, cap = not cfg.use_normalization_before_and_after, cfg.output_logits_soft_cap
    with model.trace() as t:
        read = t.prompts(torch.tensor([tokens]))

        def added(name: str, part: Value) -> None:
            _to_logit(t, read, part, answer, pos, model).save(name)

        read.logits.at(pos=pos).select("vocab", answer).save("logit")
        added("embed", read["embed"].at(pos=pos))
        if "hook_pos_embed" in t.target.axes:
            added("positions", read["pos_embed"].at(pos=pos))
        for layer in range(cfg.n_layers):
            added(f"heads {layer}", read["result" if by_head else "attn_out", layer].at(pos=pos))
            if not cfg.attn_only:
                added(f"mlp {layer}", read["mlp_out", layer].at(pos=pos))
    heads = [t[f"heads {layer}"].flatten().tolist() for layer in range(cfg.n_layers)]
    mlps = [] if cfg.attn_only else [float(t[f"mlp {layer}"]) for layer in range(cfg.n_layers)]
    others = {name: float(t[name]) for name in ("embed", "positions") if t.results and name in t.results}
    logit = float(t["logit"])
    if cap > 0:
        # What is added is added before the cap.
        logit = cap * math.atanh(logit / cap)
    total = sum(map(sum, heads)) + sum(mlps) + sum(others.values())
    return {
        "answer": spelled(model, [answer])[0],
        "logit": logit,
        "heads": heads,
        "by_head": by_head,
        "before_cap": cap > 0,
        "mlps": mlps,
        "others": {**others, "biases and the rest": logit - total},
    }


def _to_logit(t: Trace, read: Run, part: Value, answer: int, pos: int, model: ExplorableModel) -> Value:
    """What a part of the stream adds to a logit; the unembedding's bias is taken off again."""
    if model.cfg.normalization_type in ("LN", "LNPre"):
        part = part - part.mean("d_model", keep=True)
    if model.cfg.normalization_type is not None:
        part = part / read["ln_final.hook_scale"].at(pos=pos)
    if t.target.weight_shape("ln_final.w") is not None:
        part = part * t.weight("ln_final.w")
    if model.cfg.output_logits_soft_cap > 0:
        if t.target.weight_shape("unembed.W_U") is None:
            raise ValueError(
                "the logits of this model are capped, and its unembedding is tied to the embedding: load it with "
                "processing, which unties them, to see what is added before the cap"
            )
        return (part * t.weight("unembed.W_U").select(1, answer)).sum(-1)
    return (t.apply("unembed", part) - t.apply("unembed", part * 0)).select("vocab", answer)


def patch(model: ExplorableModel, fields: PlainData) -> PlainData:
    """How much of the first prompt's answer each of its activations brings back in a run of the second, as shares."""
    request = Request(model, fields)
    clean, corrupted = _pair(request)
    difference = metrics.logit_diff(request.answer("answer"), request.answer("wrong"))
    cfg = model.cfg
    cells = cfg.n_layers * (len(clean) + cfg.n_heads)
    if cells > _MOST_CELLS:
        raise ValueError(f"{cells} patched runs; the page makes {_MOST_CELLS} at most: take a shorter prompt")
    with model.trace() as t:
        source = t.prompts(torch.tensor([clean]))
        base = t.prompts(torch.tensor([corrupted]))
        source.metric(difference).save("clean")
        base.metric(difference).save("corrupted")

        def patched(place: _Place) -> Value:
            edited = t.prompts(torch.tensor([corrupted]))
            _put(edited, source, place)
            return edited.metric(difference)

        stream = [patched(("stream", layer, pos)) for layer in range(cfg.n_layers) for pos in range(len(clean))]
        heads = [patched(("head", layer, head)) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
        t.stack(stream).save("stream")
        t.stack(heads).save("heads")
    ends = float(t["clean"]), float(t["corrupted"])
    return {
        "clean": ends[0],
        "corrupted": ends[1],
        "tokens": spelled(model, clean),
        "corrupted_tokens": spelled(model, corrupted),
        "stream": _shares(t["stream"].view(cfg.n_layers, -1), *ends),
        "heads": _shares(t["heads"].view(cfg.n_layers, -1), *ends),
    }


_Place = tuple[str, int, int]


def _put(edited: Run, source: Run, place: _Place) -> None:
    """Put the source's activation at a place into a run."""
    kind, layer, index = place
    if kind == "stream":
        edited["resid_pre", layer].at(pos=index).replace(source["resid_pre", layer].at(pos=index))
    else:
        edited["z", layer].at(head=index).replace(source["z", layer].at(head=index))


def _pair(request: Request) -> tuple[list[int], list[int]]:
    """The tokens of two prompts of one length."""
    clean, corrupted = request.tokens(), request.tokens("corrupted")
    if len(clean) != len(corrupted):
        raise ValueError(
            f"the two prompts have {len(clean)} and {len(corrupted)} tokens: an activation goes into the same position "
            "of the other, so give prompts of the same length"
        )
    return clean, corrupted


def _shares(scores: Tensor, clean: float, corrupted: float) -> list[list[float]]:
    if abs(clean - corrupted) < 1e-4 * max(1.0, abs(clean)):
        raise ValueError(
            "both prompts have the same logit difference of the two answers: there is nothing to bring back"
        )
    shares: list[list[float]] = ((scores - corrupted) / (clean - corrupted)).tolist()
    return shares


def patch_cell(model: ExplorableModel, fields: PlainData) -> PlainData:
    """The likeliest next tokens of the two prompts, and of the second with one activation of the first."""
    request = Request(model, fields)
    clean, corrupted = _pair(request)
    kind = request.choice("kind", ("stream", "head"))
    layer = request.number("layer", 0, model.cfg.n_layers - 1)
    index = request.number("index", 0, (len(clean) if kind == "stream" else model.cfg.n_heads) - 1)
    with model.trace() as t:
        source, base, edited = (t.prompts(torch.tensor([tokens])) for tokens in (clean, corrupted, corrupted))
        _put(edited, source, (kind, layer, index))
        _save_next(t, {"clean": source, "corrupted": base, "patched": edited}, -1, request)
    return _next_of(model, t, ("clean", "corrupted", "patched"), request)


def ablate(model: ExplorableModel, fields: PlainData) -> PlainData:
    """The likeliest next tokens with all heads, and without some: their outputs are 0."""
    request = Request(model, fields)
    tokens, heads = request.tokens(), request.heads()
    pos = request.position(len(tokens))
    with model.trace() as t:
        base, edited = (t.prompts(torch.tensor([tokens])) for _ in range(2))
        for layer, head in heads:
            edited["z", layer].at(head=head).zero()
        _save_next(t, {"intact": base, "ablated": edited}, pos, request)
    return _next_of(model, t, ("intact", "ablated"), request)


def _save_next(t: Trace, runs: dict[str, Run], pos: int, request: Request) -> None:
    """Save what the page shows of several runs' next tokens: the likeliest of each, and how likely all of these are."""
    probabilities = {name: one.logits.at(pos=pos).softmax("vocab") for name, one in runs.items()}
    for name, one in probabilities.items():
        one.save(name)


def _next_of(model: ExplorableModel, t: Trace, names: tuple[str, ...], request: Request) -> PlainData:
    """The likeliest tokens of several runs, each with its probability in every run."""
    found = {name: t[name][0] for name in names}
    shown: list[int] = []
    for one in found.values():
        shown += [token for token in one.topk(min(5, len(one))).indices.tolist() if token not in shown]
    for name in ("answer", "wrong"):
        if request.fields.get(name):
            token = request.answer(name)
            shown += [] if token in shown else [token]
    rows = [
        {"id": token, "text": text, **{name: float(one[token]) for name, one in found.items()}}
        for token, text in zip(shown, spelled(model, shown), strict=True)
    ]
    return {"runs": list(names), "rows": rows}


def steer(model: ExplorableModel, fields: PlainData) -> PlainData:
    """A continuation as it is, and with the difference of two texts' streams added at every position."""
    request = Request(model, fields)
    prompt, towards, away = (torch.tensor([request.tokens(name)]) for name in ("prompt", "towards", "away"))
    layer = request.number("layer", 0, model.cfg.n_layers - 1)
    room = model.cfg.n_ctx - prompt.shape[1]
    if room < 1:
        raise ValueError(f"the prompt fills the model's {model.cfg.n_ctx} positions: there is no room to continue it")
    length = min(request.number("length", 1, _LONGEST, 12), room)
    coefficient = request.real("coefficient", 100.0)
    with model.trace() as t:
        ends = [t.prompts(text)["resid_post", layer].at(pos=-1) for text in (towards, away)]
        direction = (ends[0] - ends[1]) * coefficient
        plain, steered = (t.generate(prompt, max_new_tokens=length) for _ in range(2))
        steered["resid_post", layer].at(pos=slice(None)).add(direction)
        plain.generated.save("plain")
        steered.generated.save("steered")
        direction.norm("d_model").save("norm")
    return {
        "plain": spelled(model, t["plain"][0].tolist()),
        "steered": spelled(model, t["steered"][0].tolist()),
        "norm": float(t["norm"]),
    }


def _listed(model: ExplorableModel, tokens: list[int], probabilities: list[float]) -> list[PlainData]:
    return [
        {"id": token, "text": text, "probability": probability}
        for token, text, probability in zip(tokens, spelled(model, tokens), probabilities, strict=True)
    ]


VIEWS: dict[str, View] = {
    "run": run,
    "attention": attention,
    "lens": lens,
    "attribute": attribute,
    "patch": patch,
    "patch_cell": patch_cell,
    "ablate": ablate,
    "steer": steer,
}
