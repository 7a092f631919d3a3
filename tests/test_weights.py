"""Processing: it leaves every log-probability as it was, does what it says, and says so where it would not."""

from __future__ import annotations

import pytest
import torch

from hooked_lm import HookedTransformer, HookedTransformerConfig, weights
from hooked_lm.weights import STEPS, Weights, plan_processing, process
from tests.helpers import tiny_config, tiny_model, tiny_tokens
from tests.weights_helpers import EXACT, KINDS, log_probabilities, mean, model_of


def rebuilt(cfg: HookedTransformerConfig, state: Weights) -> HookedTransformer:
    """A model with processed weights, through the plain loading of modules: every name has its place, and no other."""
    model = HookedTransformer(cfg.replace(init_weights=False))
    torch.nn.Module.load_state_dict(model, state, strict=True)
    return model


def preserves(kind: str, step: str) -> bool:
    return STEPS[step].obstacle(tiny_config(**KINDS[kind])) is None


def preserving(kind: str) -> list[str]:
    return [step for step in STEPS if preserves(kind, step)]


OBSTRUCTED = [(kind, step) for kind in KINDS for step in STEPS if not preserves(kind, step)]

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_each_step_and_all_of_them_in_either_order_leave_the_log_probabilities_as_they_were(kind: str) -> None:
    model, steps = model_of(kind), preserving(kind)
    before, errors = log_probabilities(model), {}
    for plan in (*([step] for step in steps), steps, steps[::-1]):
        processed = rebuilt(*process(model.cfg, model.state_dict(), plan))
        errors[", ".join(plan)] = (log_probabilities(processed) - before).abs().max().item()
    assert len(errors) >= 4
    assert {plan: error for plan, error in errors.items() if not error < EXACT} == {}


def test_the_obstacles_are_those_that_there_are() -> None:
    refactoring = {"rotary", "query-key norm", "grouped queries", "one key-value head", "wide heads"}
    refactoring |= {"query-key LN after rotary", "some layers rotate", "attention sinks", "clipped"}
    refactoring |= {"gated attention", "gated attention, plain heads"}
    refactoring |= {"latent attention", "latent attention, LN, plain queries"}
    writing = {kind for kind, changes in KINDS.items() if changes.get("normalization_type", "LN") != "LN"}
    not_by_every_reader = {
        "norms on what is written",
        "norms on the stream",
        "norms on the stream, none at the end",
        "no final norm",
        "no first norm",
        "no first norm, positions after the norm of the embeddings",
    }
    expected = {("shortformer", "fold_ln"), ("soft-caps", "center_unembed")}
    expected |= {("clipped", "fold_value_biases"), ("attention sinks", "fold_value_biases")}
    expected |= {(kind, "fold_value_biases") for kind in ("gated attention", "gated attention, plain heads")}
    expected |= {(kind, "refactor_factored_attn_matrices") for kind in refactoring}
    expected |= {(kind, "center_writing_weights") for kind in (*writing, *not_by_every_reader, "final rms")}
    assert set(OBSTRUCTED) == expected


@pytest.mark.parametrize(
    ("kind", "step"), [pair for pair in OBSTRUCTED if pair[1] != "refactor_factored_attn_matrices"]
)
def test_a_step_with_an_obstacle_would_change_the_log_probabilities(kind: str, step: str) -> None:
    model = model_of(kind)
    processed = rebuilt(*process(model.cfg, model.state_dict(), [step]))
    assert (log_probabilities(processed) - log_probabilities(model)).abs().max().item() > 1e-4


@every_kind
def test_a_step_writes_to_nothing_it_is_given(kind: str) -> None:
    model = model_of(kind)
    state, cfg = model.state_dict(), model.cfg.replace()
    before = {name: value.clone() for name, value in state.items()}
    names = list(state)
    for step in STEPS:
        if step == "refactor_factored_attn_matrices" and not preserves(kind, step):
            continue
        process(cfg, state, [step])
        assert list(state) == names, step
        assert [name for name in names if not torch.equal(state[name], before[name])] == [], step
        assert cfg == model.cfg, step


# Each does what it says


def test_folding_removes_the_gains_and_centres_what_reads_a_layer_norm() -> None:
    model = model_of("layer norm")
    cfg, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert cfg == model.cfg.replace(normalization_type="LNPre")
    assert set(model.state_dict()) - set(state) == {
        *(f"blocks.{layer}.{norm}.{part}" for layer in range(2) for norm in ("ln1", "ln2") for part in "wb"),
        "ln_final.w",
        "ln_final.b",
    }
    readers = [f"blocks.{layer}.{W}" for layer in range(2) for W in ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in")]
    for name in (*readers, "unembed.W_U"):
        assert mean(model.state_dict()[name], -2) > 1e-2
        assert mean(state[name], -2) < 1e-12


def test_folding_after_an_rms_norm_scales_rows_by_the_gain_and_no_more() -> None:
    model = model_of("gated rms")
    cfg, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert cfg.normalization_type == "RMSPre"
    block = model.blocks[1]
    assert torch.allclose(state["blocks.1.attn.W_K"], block.ln1.w[:, None] * block.attn.W_K, atol=1e-14)
    assert torch.allclose(state["blocks.1.mlp.W_gate"], block.ln2.w[:, None] * block.mlp.W_gate, atol=1e-14)
    assert torch.allclose(state["unembed.W_U"], model.ln_final.w[:, None] * model.W_U, atol=1e-14)
    assert torch.equal(state["blocks.1.mlp.b_gate"], block.mlp.b_gate)


def test_folding_moves_the_norms_bias_into_the_readers_bias() -> None:
    model = model_of("layer norm")
    _, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    block = model.blocks[1]
    for head in range(3):
        expected = block.attn.b_Q[head] + block.ln1.b @ block.attn.W_Q[head]
        assert torch.allclose(state["blocks.1.attn.b_Q"][head], expected, atol=1e-13)
    assert torch.allclose(state["unembed.b_U"], model.b_U + model.ln_final.b @ model.W_U, atol=1e-13)


def test_folding_leaves_norms_that_write_to_the_stream() -> None:
    model = model_of("norms before and after")
    _, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert torch.equal(state["blocks.0.ln1_post.w"], model.blocks[0].ln1_post.w)
    assert torch.equal(state["blocks.0.ln2_post.b"], model.blocks[0].ln2_post.b)


@pytest.mark.parametrize("placement", ["after", "residual"])
def test_folding_where_no_reader_has_a_norm_folds_the_final_one_alone(placement: str) -> None:
    model = tiny_model(norm_placement=placement)
    cfg, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert cfg.normalization_type == "LNPre"
    assert set(model.state_dict()) - set(state) == {"ln_final.w", "ln_final.b"}
    changed = {name for name, value in state.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"unembed.W_U", "unembed.b_U"}


def test_folding_the_norm_of_solu_gives_its_gain_to_the_output_matrix() -> None:
    model = model_of("solu_ln")
    _, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert not {name for name in state if ".mlp.ln." in name}
    mlp = model.blocks[0].mlp
    assert torch.allclose(state["blocks.0.mlp.b_out"], mlp.b_out + mlp.ln.b @ mlp.W_out, atol=1e-13)


@pytest.mark.parametrize("normalization_type", [None, "LNPre", "RMSPre"])
def test_without_a_gain_there_is_nothing_to_fold(normalization_type: str | None) -> None:
    model = tiny_model(normalization_type=normalization_type)
    cfg, state = weights.fold_layer_norm(model.cfg, model.state_dict())
    assert cfg == model.cfg
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["layer norm", "rms", "grouped queries", "experts", "attention only"])
def test_centring_what_is_written_makes_every_mean_zero_and_changes_nothing_else(kind: str) -> None:
    model = model_of(kind)
    cfg, state = weights.center_writing_weights(model.cfg, model.state_dict())
    written = {"embed.W_E", "pos_embed.W_pos"}
    for layer in range(2):
        written |= {f"blocks.{layer}.attn.W_O", f"blocks.{layer}.attn.b_O"}
        if not cfg.attn_only:
            written |= {f"blocks.{layer}.mlp.W_out", f"blocks.{layer}.mlp.b_out"}
    for name, value in model.state_dict().items():
        if name in written:
            assert torch.allclose(state[name], value - value.mean(-1, keepdim=True), atol=1e-14), name
            assert mean(state[name], -1) < 1e-12, name
        else:
            assert torch.equal(state[name], value), name
    assert cfg == model.cfg


def test_centring_what_is_written_leaves_positions_that_bypass_the_stream() -> None:
    model = model_of("shortformer")
    _, state = weights.center_writing_weights(model.cfg, model.state_dict())
    assert torch.equal(state["pos_embed.W_pos"], model.W_pos)


@pytest.mark.parametrize("kind", ["layer norm", "shared expert", "tied"])
def test_after_centring_the_stream_has_mean_zero_at_every_layer(kind: str) -> None:
    model = model_of(kind)
    _, cache = rebuilt(*weights.center_writing_weights(model.cfg, model.state_dict())).run_with_cache(tiny_tokens())
    for layer in range(2):
        assert mean(cache["resid_pre", layer], -1) < 1e-12
        assert mean(cache["resid_post", layer], -1) < 1e-12


def test_centring_the_unembedding_makes_its_means_zero_and_changes_nothing_else() -> None:
    model = model_of("layer norm")
    cfg, state = weights.center_unembed(model.cfg, model.state_dict())
    assert mean(state["unembed.W_U"], -1) < 1e-12
    assert mean(state["unembed.b_U"], -1) < 1e-12
    unchanged = set(state) - {"unembed.W_U", "unembed.b_U"}
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in unchanged)
    logits = rebuilt(cfg, state)(tiny_tokens())
    assert mean(logits, -1) < 1e-12


@pytest.mark.parametrize("kind", ["layer norm", "grouped queries", "one key-value head"])
def test_folding_value_biases_makes_them_zero_and_moves_them_to_the_output_bias(kind: str) -> None:
    model = model_of(kind)
    _, state = weights.fold_value_biases(model.cfg, model.state_dict())
    for layer, block in enumerate(model.blocks):
        assert torch.equal(state[f"blocks.{layer}.attn.b_V"], torch.zeros_like(block.attn.b_V))
        group = model.cfg.n_heads // model.cfg.n_kv_heads
        moved = sum(block.attn.b_V[head // group] @ block.attn.W_O[head] for head in range(model.cfg.n_heads))
        assert torch.allclose(state[f"blocks.{layer}.attn.b_O"], block.attn.b_O + moved, atol=1e-13)


@pytest.mark.parametrize("kind", ["layer norm", "alibi", "odd head size"])
def test_refactoring_shares_the_singular_values_evenly_and_keeps_the_circuits(kind: str) -> None:
    model = model_of(kind)
    _, state = weights.refactor_factored_attn_matrices(model.cfg, model.state_dict())
    for layer, block in enumerate(model.blocks):
        new = {name: state[f"blocks.{layer}.attn.{name}"] for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")}
        for head in range(model.cfg.n_heads):
            Q = torch.cat((new["W_Q"][head], new["b_Q"][head][None]))
            K = torch.cat((new["W_K"][head], new["b_K"][head][None]))
            old_Q = torch.cat((block.attn.W_Q[head], block.attn.b_Q[head][None]))
            old_K = torch.cat((block.attn.W_K[head], block.attn.b_K[head][None]))
            S = torch.linalg.svdvals(old_Q @ old_K.T)[: model.cfg.d_head]
            assert torch.allclose(Q @ K.T, old_Q @ old_K.T, atol=1e-12)
            assert torch.allclose(Q.T @ Q, S.diag(), atol=1e-12)
            assert torch.allclose(K.T @ K, S.diag(), atol=1e-12)
            V, out = new["W_V"][head], new["W_O"][head]
            old_OV = block.attn.W_V[head] @ block.attn.W_O[head]
            S = torch.linalg.svdvals(old_OV)[: model.cfg.d_head]
            assert torch.allclose(V @ out, old_OV, atol=1e-12)
            assert torch.allclose(V.T @ V, S.square().diag(), atol=1e-12)
            assert torch.allclose(out @ out.T, torch.eye(model.cfg.d_head, dtype=out.dtype), atol=1e-12)
        assert not new["b_V"].any()


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("rotary", "refactor_factored_attn_matrices: rotary positions"),
        ("query-key norm", "refactor_factored_attn_matrices: the query-key norm"),
        ("grouped queries", "refactor_factored_attn_matrices: with grouped queries"),
        ("wide heads", "refactor_factored_attn_matrices: d_head 14 exceeds d_model 12"),
        ("clipped", "refactor_factored_attn_matrices: values are clipped with their bias"),
    ],
)
def test_refactoring_raises_where_the_basis_of_a_head_is_fixed(kind: str, match: str) -> None:
    model = model_of(kind)
    with pytest.raises(ValueError, match=match):
        weights.refactor_factored_attn_matrices(model.cfg, model.state_dict())


# Part of a model


@pytest.mark.parametrize(
    "kind",
    [
        "layer norm",
        "gated rms",
        "grouped queries",
        "experts",
        "solu_ln",
        "attention only",
        "tied",
        "shared expert",
        "norms on the stream",
    ],
)
def test_a_step_does_to_one_block_what_it_does_to_that_block_in_the_whole(kind: str) -> None:
    model = model_of(kind)
    part = {name: value for name, value in model.state_dict().items() if name.startswith("blocks.1.")}
    for step in STEPS:
        if step == "refactor_factored_attn_matrices" and not preserves(kind, step):
            continue
        whole_cfg, whole = process(model.cfg, model.state_dict(), [step])
        part_cfg, processed = process(model.cfg, part, [step])
        assert part_cfg == whole_cfg, step
        assert set(processed) == {name for name in whole if name.startswith("blocks.1.")}, step
        assert [name for name, value in processed.items() if not torch.equal(value, whole[name])] == [], step


@pytest.mark.parametrize("step", STEPS)
def test_a_step_works_on_what_is_outside_the_blocks(step: str) -> None:
    model = model_of("layer norm")
    _, whole = process(model.cfg, model.state_dict(), [step])
    part = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    _, processed = process(model.cfg, part, [step])
    assert set(processed) == {name for name in whole if not name.startswith("blocks.")}
    assert all(torch.equal(value, whole[name]) for name, value in processed.items())


# What is read off the weights of layers that differ


def test_dense_layers_among_mixtures_do_not_stack_and_say_where_to_look() -> None:
    model = model_of("shared expert")
    shapes = r"\(4, 12, 10\), \(12, 48\)"
    with pytest.raises(ValueError, match=rf"W_in does not stack: its shapes are {shapes}.*blocks\[layer\]\.mlp\.W_in"):
        _ = model.W_in
    for name in ("W_gate", "W_out", "b_in", "b_gate", "b_out"):
        with pytest.raises(ValueError, match=f"{name} does not stack"):
            getattr(model, name)
    assert model.W_Q.shape == (2, 3, 12, 4)
    alike = model_of("experts with a limit")
    assert torch.equal(alike.W_out, torch.stack([block.mlp.W_out for block in alike.blocks]))


# What is planned


@every_kind
def test_what_preserves_the_function_is_planned_in_silence_and_what_would_change_it_warns_if_asked_for(
    kind: str,
) -> None:
    cfg = tiny_config(**KINDS[kind])
    for step in STEPS:
        asked = {name: name == step for name in STEPS}
        if preserves(kind, step):
            assert plan_processing(cfg, asked) == [step]
            continue
        with pytest.warns(UserWarning, match=f"{step} is left out, since it would change what the model computes"):
            assert plan_processing(cfg, asked) == []
    by_default = [step for step in preserving(kind) if step != "refactor_factored_attn_matrices"]
    assert plan_processing(cfg, dict.fromkeys(STEPS)) == plan_processing(cfg, {}) == by_default


def test_what_is_not_wanted_is_not_planned() -> None:
    assert plan_processing(tiny_config(), dict.fromkeys(STEPS, False)) == []
