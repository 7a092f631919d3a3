"""The Python that does what the page does: a program for each view, with the values that are on the page."""

from __future__ import annotations

from hooked_lm._support.plain_data import PlainData
from hooked_lm.explorer.prompts import ExplorableModel, Request

__all__ = ["program"]

_LOADED = """import torch
{load}

prompt = torch.tensor([{tokens}])  # {text}
"""
_PAIR = "corrupted_prompt = torch.tensor([{corrupted}])  # {corrupted_text}\n"

_PROGRAMS = {
    "run": """
with model.trace() as t:
    probabilities, tokens = t.prompts(prompt).logits.at(pos={pos}).softmax("vocab").topk({k})
    probabilities.save("probabilities")
    tokens.save("tokens")
for token, probability in zip(t["tokens"][0].tolist(), t["probabilities"][0].tolist()):
    print(f"{{probability:.4f}}", token)
""",
    "attention": """
with model.trace() as t:
    t.prompts(prompt)["pattern", {layer}].save("patterns")
print(t["patterns"][0, {head}])  # [query key]
""",
    "lens": """
with model.trace() as t:
    run = t.prompts(prompt)
    for layer in range({n_layers}):
        t.logits_of(run["resid_pre", layer]).softmax("vocab").save(str(layer))
for layer in range({n_layers}):
    probabilities, tokens = t[str(layer)][0].max(-1)
    print(layer, tokens.tolist(), [round(one, 3) for one in probabilities.tolist()])
""",
    "attribute": """
answer, pos = {answer}, {pos}
with model.trace() as t:
    run = t.prompts(prompt)
    scale = run["ln_final.hook_scale"].at(pos=pos)
    for layer in range({n_layers}):
        part = run["result", layer].at(pos=pos)
        part = (part - part.mean("d_model", keep=True)) / scale
        (t.apply("unembed", part) - t.apply("unembed", part * 0)).select("vocab", answer).save(str(layer))
for layer in range({n_layers}):
    print(layer, t[str(layer)][0].tolist())  # what each head adds to the answer's logit
""",
    "patch": """
from hooked_lm import metrics

difference = metrics.logit_diff({answer}, {wrong})
with model.trace() as t:
    clean, corrupted = t.prompts(prompt), t.prompts(corrupted_prompt)
    clean.metric(difference).save("clean")
    corrupted.metric(difference).save("corrupted")

    def patched(layer, pos):
        run = t.prompts(corrupted_prompt)
        run["resid_pre", layer].at(pos=pos).replace(clean["resid_pre", layer].at(pos=pos))
        return run.metric(difference)

    t.stack([patched(layer, pos) for layer in range({n_layers}) for pos in range({n_tokens})]).save("grid")
shares = (t["grid"].view({n_layers}, {n_tokens}) - t["corrupted"]) / (t["clean"] - t["corrupted"])
print(shares)
""",
    "patch_cell": """
with model.trace() as t:
    clean, run = t.prompts(prompt), t.prompts(corrupted_prompt)
    run["{site}", {layer}].at({place}={index}).replace(clean["{site}", {layer}].at({place}={index}))
    run.logits.at(pos=-1).softmax("vocab").save("patched")
print(t["patched"][0].topk(5))
""",
    "ablate": """
heads = {heads}
with model.trace() as t:
    run = t.prompts(prompt)
    for layer, head in heads:
        run["z", layer].at(head=head).zero()
    run.logits.at(pos={pos}).softmax("vocab").save("ablated")
print(t["ablated"][0].topk(5))
""",
    "steer": """
towards, away = torch.tensor([{towards}]), torch.tensor([{away}])
with model.trace() as t:
    ends = [t.prompts(text)["resid_post", {layer}].at(pos=-1) for text in (towards, away)]
    steered = t.generate(prompt, max_new_tokens={length})
    steered["resid_post", {layer}].at(pos=slice(None)).add((ends[0] - ends[1]) * {coefficient})
    steered.generated.save("steered")
print(t["steered"][0].tolist())
""",
}


def program(model: ExplorableModel, load: str, fields: PlainData) -> str:
    """Return the Python that does what a view does.

    Args:
        model: the model.
        load: the lines that load it, as `model`.
        fields: of the view's request, and its name as `view`.

    Raises:
        ValueError: there is no such view, or the request is not one of it.
    """
    request, cfg = Request(model, fields), model.cfg
    view = request.choice("view", tuple(_PROGRAMS))
    tokens = request.tokens()
    values: PlainData = {
        "load": load,
        "tokens": tokens,
        "text": _comment(fields["prompt"]),
        "n_layers": cfg.n_layers,
        "n_tokens": len(tokens),
        "pos": request.position(len(tokens)) if view != "patch_cell" else None,
        "k": min(10, cfg.d_vocab_out),
    }
    if view in ("patch", "patch_cell"):
        values |= {"corrupted": request.tokens("corrupted"), "corrupted_text": _comment(fields["corrupted"])}
    if view in ("attribute", "patch"):
        values["answer"] = request.answer("answer")
    if view == "patch":
        values["wrong"] = request.answer("wrong")
    if view == "attention":
        values |= {
            "layer": request.number("layer", 0, cfg.n_layers - 1, 0),
            "head": request.number("head", 0, cfg.n_heads - 1, 0),
        }
    if view == "patch_cell":
        stream = request.choice("kind", ("stream", "head")) == "stream"
        most = (len(tokens) if stream else cfg.n_heads) - 1
        values |= {"site": "resid_pre" if stream else "z", "place": "pos" if stream else "head"}
        values |= {"layer": request.number("layer", 0, cfg.n_layers - 1), "index": request.number("index", 0, most)}
    if view == "ablate":
        values["heads"] = request.heads()
    if view == "steer":
        values |= {"towards": request.tokens("towards"), "away": request.tokens("away")}
        values |= {"layer": request.number("layer", 0, cfg.n_layers - 1), "length": request.number("length", 1, 40, 12)}
        values["coefficient"] = request.real("coefficient", 100.0)
    head = _LOADED + (_PAIR if "corrupted" in values else "")
    body = _PROGRAMS[view]
    if view == "attribute":
        body = _fitted(body, model)
    return (head + body).format(**values)


def _fitted(body: str, model: ExplorableModel) -> str:
    """The program of the attribution for a model's final norm and heads."""
    kind = model.cfg.normalization_type
    centred, gained = kind in ("LN", "LNPre"), kind in ("LN", "RMS")
    part = 'part - part.mean("d_model", keep=True)' if centred else "part"
    divided = f"({part}) / scale" if centred else f"{part} / scale"
    expression = divided if kind is not None else part
    if gained:
        expression += ' * t.weight("ln_final.w")'
    body = body.replace('(part - part.mean("d_model", keep=True)) / scale', expression)
    if kind is None:
        body = body.replace('    scale = run["ln_final.hook_scale"].at(pos=pos)\n', "")
    if model.cfg.output_logits_soft_cap > 0:
        after = '(t.apply("unembed", part) - t.apply("unembed", part * 0)).select("vocab", answer)'
        body = body.replace(after, '(part * t.weight("unembed.W_U").select(1, answer)).sum(-1)')
    if model.cfg.use_normalization_before_and_after:
        body = body.replace('run["result", layer]', 'run["attn_out", layer]').replace(
            "each head adds", "attention adds"
        )
    return body


def _comment(text: object) -> str:
    """A text as one line of a comment, without braces of its own."""
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:79] + "…"
