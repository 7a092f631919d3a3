"""Information routes equal a naive search, and find what was wired by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, Intervention, plotting
from hooked_lm.circuits import routes
from hooked_lm.circuits.routes import information_routes
from hooked_lm.circuits.routes_result import InformationRoutes
from hooked_lm.components.norm import Norm
from tests.architectures_helpers import LATENT, ROTARY
from tests.helpers import LargestTensor, tiny_model, tiny_tokens

QUIET: dict[str, Any] = {"verbose": False}
TOKENS = tiny_tokens(batch=1, pos=6)

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no norms": {"normalization_type": None},
    "parallel": {"parallel_attn_mlp": True, "normalization_type": "RMS"},
    "attention only": {"attn_only": True},
    "grouped queries": {"n_heads": 4, "n_key_value_heads": 2, **ROTARY},
    "ungrouped": {"n_heads": 4, "n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "norms around": {"norm_placement": "before_and_after", "normalization_type": "RMS"},
    "norms after": {"norm_placement": "after"},
    "norms on the stream": {"norm_placement": "residual"},
    "norms on the stream, attention only": {"norm_placement": "residual", "attn_only": True},
    "gated heads": {"attention_gate": True},
    "gated heads, norms around": {"attention_gate": True, "norm_placement": "before_and_after"},
    "sinks": {"attention_sinks": True},
    "latent": LATENT,
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "local": {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global"]},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "bidirectional": {"attention_dir": "bidirectional"},
}

# (kind, layer, head, source position, state, destination position) -> importance
Edges = dict[tuple[str, int, int | None, int | None, str, int], float]


def held(norm: Any, scale: Tensor, x: Tensor) -> Tensor:
    """The norm without its bias, with a scale held fixed."""
    if not isinstance(norm, Norm):
        return x
    x = x - x.mean() if norm.centred else x
    return x / scale * (1.0 if norm.w is None else norm.w)


@torch.no_grad()
def naive(model: HookedTransformer, tokens: Tensor, pos: int, threshold: float) -> Edges:
    """The routes by recursion, a term at a time, from the definition."""
    _, cache = model.run_with_cache(tokens)
    cfg, on_stream = model.cfg, model.cfg.norm_placement == "residual"
    found: Edges = {}
    visited = set[tuple[int, str, int]]()

    def scale(norm: Any, query: int) -> Tensor:
        return cache[norm.hook_scale.name][0, query] if isinstance(norm, Norm) else torch.ones(1)

    def heads_of(layer: int, query: int, norm: Any) -> dict[tuple[str, int | None, int | None], Tensor]:
        block = model.blocks[layer]
        terms: dict[tuple[str, int | None, int | None], Tensor] = {}
        for head in range(cfg.n_heads):
            for key in range(tokens.shape[1]):
                v = cache["v", layer][0, key]
                v = v[head * len(v) // cfg.n_heads] * cache["pattern", layer][0, head, query, key]
                v = v * cache["gate", layer][0, query, head] if cfg.attention_gate else v
                written = held(block.ln1_post, scale(block.ln1_post, query), v @ block.attn.W_O[head])
                terms["head", head, key] = held(norm, scale(norm, query), written)
        return terms

    def visit(layer: int, state: str, query: int) -> None:
        if (layer, state, query) in visited:
            return
        visited.add((layer, state, query))
        block, y = model.blocks[layer], cache[f"resid_{state}", layer][0, query]
        attention = state == "mid" or cfg.attn_only or cfg.parallel_attn_mlp
        before = "pre" if attention else "mid"
        norm = (block.ln1 if attention else block.ln2) if on_stream else None
        terms = heads_of(layer, query, norm) if attention else {}
        for kind, site in (("residual", f"resid_{before}"), ("mlp", "mlp_out")):
            if kind == "residual" or (state == "post" and not cfg.attn_only):
                terms[kind, None, query] = held(norm, scale(norm, query), cache[site, layer][0, query])
        terms["bias", None, None] = y - torch.stack(list(terms.values())).sum(0)
        near = {name: max(0.0, float(y.abs().sum() - (y - term).abs().sum())) for name, term in terms.items()}
        for (kind, head, source), value in near.items():
            importance = value / (sum(near.values()) or 1.0)
            edge = (kind, layer, head, source, f"{layer}_{state}", query)
            if importance <= threshold:
                continue
            found[edge] = importance
            if kind != "bias" and not (before == "pre" and layer == 0):
                assert source is not None
                visit(layer if before == "mid" else layer - 1, "mid" if before == "mid" else "post", source)

    visit(cfg.n_layers - 1, "post", pos)
    return found


def edges_of(found: InformationRoutes) -> Edges:
    return {
        (
            edge.kind,
            edge.layer,
            edge.head,
            None if edge.source is None else edge.source.pos,
            edge.destination.state,
            edge.destination.pos,
        ): edge.importance
        for edge in found.edges
    }


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_routes_are_those_of_a_recursion_over_single_terms(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_NUMBERS_AT_A_TIME", 150)  # blocks of two terms
    model = tiny_model(**fields)
    for pos, threshold in ((5, 0.03), (3, 0.0)):
        got = information_routes(model, TOKENS, pos=pos, threshold=threshold, **QUIET)
        expected = naive(model, TOKENS, pos, threshold)
        # Of zero biases the subtraction above leaves rounding.
        expected = {edge: value for edge, value in expected.items() if value > 1e-12}
        assert edges_of(got) == pytest.approx(expected, abs=1e-10)
        assert got.off < 1e-12


@pytest.mark.parametrize("fields", [{}, {"norm_placement": "residual"}, {"parallel_attn_mlp": True}])
def test_importances_of_a_state_sum_to_one_and_no_flow_is_lost_without_a_threshold(fields: dict[str, Any]) -> None:
    found = information_routes(tiny_model(**fields), TOKENS, threshold=0.0, **QUIET)
    by_state = dict.fromkeys((edge.destination for edge in found.edges), 0.0)
    for edge in found.edges:
        by_state[edge.destination] += edge.importance
    assert list(by_state.values()) == pytest.approx([1.0] * len(by_state))
    assert set(by_state) == {node for node in found.nodes if node.depth > 0}
    assert float(found.inputs.sum()) + found.bias_flow == pytest.approx(1.0)
    assert found.lost == pytest.approx(0.0, abs=1e-12)


def test_flow_is_the_product_of_importances_summed_over_the_ways() -> None:
    found = information_routes(tiny_model(), TOKENS, threshold=0.02, **QUIET)

    def ways(node: Any) -> float:
        if node == found.start:
            return 1.0
        return sum(edge.importance * ways(edge.destination) for edge in found.edges if edge.source == node)

    flows = {edge: edge.importance * ways(edge.destination) for edge in found.edges}
    assert [edge.flow for edge in found.edges] == pytest.approx(list(flows.values()))
    at_the_tokens = [ways(type(found.start)(0, "0_pre", pos)) for pos in range(6)]
    assert found.inputs.tolist() == pytest.approx(at_the_tokens)
    assert found.lost == pytest.approx(1 - sum(at_the_tokens) - found.bias_flow)


# A known route


def wired(noise: float = 0.003) -> HookedTransformer:
    """L0H1 copies from position 2 to 3, L1H0 from 3 to 5; all other heads, and these elsewhere, write noise."""
    fields = {"attn_only": True, "normalization_type": None, "act_fn": None, "use_attn_scale": False}
    model = tiny_model(**fields, d_model=16, n_heads=3, d_head=4, n_ctx=6, d_vocab=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, noise if "attn" in name else 0.0, generator=generator)
        model.pos_embed.W_pos[:, :6] = torch.eye(6)
        for layer, (head, query, key, reads, writes) in enumerate(((1, 3, 2, 2, 8), (0, 5, 3, 8, 12))):
            attn = model.blocks[layer].attn
            attn.W_Q[head, query, 0], attn.W_K[head, key, 0] = 10.0, 10.0
            attn.b_Q[head, 1], attn.W_K[head, 0, 1] = 1.0, 30.0  # other queries attend to position 0
            attn.W_V[head, reads, 1], attn.W_O[head, 1, writes] = 1.0, 1.0
    return model


def test_the_two_heads_of_a_wired_route_are_found_and_no_others() -> None:
    tokens = torch.tensor([0, 1, 2, 3, 1, 0])
    found = information_routes(wired(), tokens, **QUIET)
    moves = {(e.layer, e.head, e.source.pos, e.destination.pos) for e in found.of_kind("head") if e.source}
    assert moves == {(0, 1, 2, 3), (1, 0, 3, 5)}
    assert {node.pos for node in found.nodes} == {2, 3, 5}
    # Each of the heads writes as much as there was, 1 beside 1.
    assert [edge.importance for edge in found.of_kind("head")] == pytest.approx([0.5, 0.5], abs=0.03)
    assert found.inputs.tolist() == pytest.approx([0, 0, 0.25, 0.25, 0, 0.5], abs=0.05)
    assert {(one.layer, one.head) for one in found.heads().top(2)} == {(1, 0), (0, 1)}
    assert found.heads().scores.count_nonzero() == 2
    assert [(one.layer, one.head) for one in found.heads("flow").top(2)] == [(1, 0), (0, 1)]
    assert len(information_routes(wired(), tokens, threshold=0.0, **QUIET).of_kind("head")) > 20


def test_a_route_from_another_position_does_not_pass_the_wired_heads() -> None:
    found = information_routes(wired(), torch.tensor([0, 1, 2, 3, 1, 0]), pos=4, **QUIET)
    assert found.of_kind("head") == []
    assert {node.pos for node in found.nodes} == {4}


# Runs


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_positions_and_nothing_else(side: str) -> None:
    model = tiny_model()
    alone = information_routes(model, TOKENS, pos=4, **QUIET)
    pad, first = torch.zeros(1, 2, dtype=torch.long), 2 if side == "left" else 0
    tokens, mask = torch.cat((pad, TOKENS, pad), 1)[:, 2 - first :][:, :8], torch.ones(1, 8, dtype=torch.long)
    mask[:, slice(0, 2) if first else slice(6, 8)] = 0
    padded = information_routes(model, tokens, pos=first + 4, attention_mask=mask, **QUIET)
    assert [edge.importance for edge in padded.edges] == pytest.approx([edge.importance for edge in alone.edges])
    assert [edge.destination.pos - first for edge in padded.edges] == [edge.destination.pos for edge in alone.edges]
    with pytest.raises(ValueError, match="padding"):
        information_routes(model, tokens, pos=0 if first else -1, attention_mask=mask, **QUIET)


def test_precisions_agree_and_half_precision_is_taken() -> None:
    exact = information_routes(tiny_model(), TOKENS, **QUIET)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = tiny_model(dtype=dtype)
        model.load_state_dict(tiny_model().state_dict())
        found = information_routes(model, TOKENS, threshold=0.0, **QUIET)
        assert {edge: edges_of(found)[edge] for edge in edges_of(exact)} == pytest.approx(edges_of(exact), abs=close)
        assert float(found.inputs.sum()) + found.bias_flow == pytest.approx(1.0, abs=1e-5)


def test_a_state_whose_terms_cancel_each_other_ends_the_routes_and_is_named() -> None:
    model = tiny_model(attn_only=True, normalization_type=None, n_layers=1)
    with torch.no_grad():
        for parameter in model.blocks[0].attn.parameters():
            parameter.zero_()
        # The bias takes away the whole stream of this token but for a hundredth.
        model.blocks[0].attn.b_O.copy_(-0.99 * (model.W_E[int(TOKENS[0, 0])] + model.W_pos[0]))
    found = information_routes(model, TOKENS[:, :1], threshold=0.0, **QUIET)
    assert found.cancelled == (found.start,)
    assert (found.edges, found.lost) == ((), 1.0)
    assert "1 states whose terms cancel" in str(found)
    assert information_routes(tiny_model(), TOKENS, **QUIET).cancelled == ()


def test_terms_are_formed_in_blocks() -> None:
    model, tokens = tiny_model(n_ctx=64), tiny_tokens(batch=1, pos=64)
    with LargestTensor() as largest, pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_NUMBERS_AT_A_TIME", 4096)
        information_routes(model, tokens, threshold=0.0, **QUIET)
    # All terms of a layer would be 64 * 64 * 3 * 12 numbers; the pattern has a twelfth of them.
    assert largest.numbers <= 64 * 64 * 3


def test_hooks_act_in_the_run_and_an_edit_that_breaks_a_sum_is_refused() -> None:
    model = tiny_model()
    pattern = Intervention("blocks.1.attn.hook_pattern", "zero", head=0)
    with model.intervening([pattern]):
        found = information_routes(model, TOKENS, threshold=0.0, **QUIET)
    assert {edge.head for edge in found.of_kind("head") if edge.layer == 1} == {1, 2}
    broken = Intervention("blocks.0.attn.hook_z", "scale", 2.0)
    with model.intervening([broken]), pytest.raises(ValueError, match=r"terms of blocks\.0\.hook_resid_mid sum to"):
        information_routes(model, TOKENS, threshold=0.0, **QUIET)


def test_models_whose_terms_do_not_add_up_are_refused() -> None:
    model = tiny_model()
    model.blocks[0].attn.forward = lambda *args: 0.0  # type: ignore[assignment]
    with pytest.raises(ValueError, match="information routes"):
        information_routes(model, TOKENS, **QUIET)
    on_stream = tiny_model(norm_placement="residual")
    on_stream.blocks[0].ln2.forward = lambda x: 2 * x  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"blocks\.0\.ln2"):
        information_routes(on_stream, TOKENS, **QUIET)
    past_a_layer = {"shortcut_experts": True, "num_experts": 3, "experts_per_token": 2, "d_expert": 8}
    with pytest.raises(ValueError, match="routes would lead past them"):
        information_routes(tiny_model(**past_a_layer), TOKENS, **QUIET)
    with pytest.raises(ValueError, match="no layers"):
        information_routes(tiny_model(n_layers=0), TOKENS, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"precision": 2.0}, "precision"),
        ({"pos": 6}, "positions 0-5"),
        ({"pos": -7}, "positions 0-5"),
        ({"prompt": tiny_tokens()}, "one prompt, got 2"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        information_routes(tiny_model(), **{"prompt": TOKENS, **QUIET, **options})


# Results


def test_tables_and_rows_say_what_the_edges_say() -> None:
    found = information_routes(wired(), torch.tensor([0, 1, 2, 3, 1, 0]), **QUIET)
    assert found.table().splitlines()[0] == "2 of 2 head edges above 0.04 into 1_post at position 5"
    assert found.top(1)[0].label in str(found)
    rows = found.rows()
    assert [row["importance"] for row in rows] == [edge.importance for edge in found.edges]
    move = next(row for row in rows if row["kind"] == "head")
    assert (move["layer"], move["head"], move["source"], move["destination"]) == (1, 0, 3, 5)
    assert (move["source_token"], move["token"], move["source_state"], move["state"]) == ("3", "0", "0_post", "1_post")
    assert found.top(100, kind=None, by="flow")[0].flow == max(edge.flow for edge in found.edges)
    assert len(found.top(100, kind=None)) == len(found.edges)


@pytest.mark.usefixtures("no_type_checks")
def test_a_result_refuses_what_it_does_not_have() -> None:
    found = information_routes(wired(), torch.tensor([0, 1, 2, 3, 1, 0]), **QUIET)
    with pytest.raises(ValueError, match="ordered by"):
        found.heads("size")  # type: ignore[arg-type]
    wrong: dict[str, Any]
    for wrong in ({"k": 0}, {"by": "size"}, {"kind": "neuron"}):
        with pytest.raises(ValueError, match=r"k is at least|ordered by|kind is one of"):
            found.top(**wrong)


def test_the_figure_draws_every_edge_and_names_every_token() -> None:
    found = information_routes(wired(), torch.tensor([0, 1, 2, 3, 1, 0]), **QUIET)
    figure = plotting.route_graph(found)
    hover = next(list(trace.customdata) for trace in figure.data if trace.customdata is not None)
    with_source = [edge for edge in found.edges if edge.source is not None]
    assert len(hover) == len(with_source)
    assert any("L1H0 3 -&gt; 5" in one for one in hover)
    assert list(figure.layout.xaxis.ticktext) == list(found.strings)
    colours = next(list(trace.marker.color) for trace in figure.data if trace.customdata is not None)
    assert colours == pytest.approx(sorted(edge.importance for edge in with_source))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert sum(sum(x is None for x in trace.x) for trace in lines) == len(with_source)
    wide = max(lines, key=lambda trace: trace.line.width)
    assert {x for x in wide.x if x is not None} == {5.0}  # into 0_post, where no head writes to it
