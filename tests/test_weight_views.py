"""The weights under their circuit names, and the memory layout that the projections rely on."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_lm import FactoredMatrix, HookedTransformer, SVDInterpreter
from hooked_lm.circuits.svd import circuit_vectors
from tests.helpers import tiny_config, tiny_model, tiny_tokens

GROUPED = {"n_heads": 6, "d_head": 4, "n_key_value_heads": 2}


# Stacks


def test_attention_weights_are_stacked_over_layers() -> None:
    model = tiny_model(**GROUPED)
    shapes = {
        "W_Q": (2, 6, 12, 4),
        "W_K": (2, 6, 12, 4),
        "W_V": (2, 6, 12, 4),
        "W_O": (2, 6, 4, 12),
        "b_Q": (2, 6, 4),
        "b_K": (2, 6, 4),
        "b_V": (2, 6, 4),
        "b_O": (2, 12),
    }
    for name, shape in shapes.items():
        stack = getattr(model, name)
        assert stack.shape == shape, name
        for layer in range(2):
            own = getattr(model.blocks[layer].attn, name)
            # Keys and values: for each query head those of its key-value head.
            assert torch.equal(stack[layer], own if name == "b_O" else own.repeat_interleave(6 // len(own), 0)), name


@pytest.mark.parametrize("changes", [{}, {"num_experts": 3, "experts_per_token": 2}])
def test_mlp_weights_are_stacked_over_layers(changes: dict[str, Any]) -> None:
    model = tiny_model(gated_mlp=True, d_mlp=7, **changes)
    expert = (3,) if changes else ()
    shapes = {"W_in": (12, 7), "W_gate": (12, 7), "W_out": (7, 12), "b_in": (7,), "b_gate": (7,), "b_out": (12,)}
    for name, shape in shapes.items():
        stack = getattr(model, name)
        assert stack.shape == (2, *expert, *shape), name
        assert all(torch.equal(stack[layer], getattr(model.blocks[layer].mlp, name)) for layer in range(2)), name


def test_the_embeddings_are_the_parameters_themselves() -> None:
    model = tiny_model(d_vocab_out=7)
    assert model.W_E is model.embed.W_E
    assert model.W_pos is model.pos_embed.W_pos
    assert model.W_U is model.unembed.W_U
    assert model.b_U is model.unembed.b_U
    assert (model.W_E.shape, model.W_pos.shape) == ((20, 12), (16, 12))
    assert (model.W_U.shape, model.b_U.shape) == ((12, 7), (7,))


def test_token_and_position_embeddings_stand_one_below_the_other() -> None:
    model = tiny_model()
    assert model.W_E_pos.shape == (36, 12)
    assert torch.equal(model.W_E_pos[:20], model.W_E)
    assert torch.equal(model.W_E_pos[20:], model.W_pos)


def test_a_gradient_flows_through_a_stack() -> None:
    model = tiny_model()
    model.W_O[1].sum().backward()
    assert torch.equal(model.blocks[1].attn.W_O.grad, torch.ones_like(model.blocks[1].attn.W_O))
    assert not model.blocks[0].attn.W_O.grad.any()


@pytest.mark.parametrize(
    ("changes", "name", "match"),
    [
        ({"attn_only": True, "act_fn": None}, "W_in", "this model has no W_in: .*attn_only=True"),
        ({}, "W_gate", "this model has no W_gate: .*gated_mlp=False"),
        ({}, "b_gate", "this model has no b_gate: .*gated_mlp=False"),
        (
            {"positional_embedding_type": "rotary"},
            "W_pos",
            "this model has no W_pos: positional_embedding_type='rotary'",
        ),
        ({"n_layers": 0}, "W_Q", "this model has no W_Q: .*n_layers=0"),
    ],
)
def test_a_weight_that_a_model_does_not_have_raises_and_is_named(
    changes: dict[str, Any], name: str, match: str
) -> None:
    model = tiny_model(**changes)
    with pytest.raises(AttributeError, match=match):
        getattr(model, name)
    assert not hasattr(model, name)


# Circuits


@pytest.mark.parametrize("changes", [{}, GROUPED, {"n_key_value_heads": 1}])
def test_qk_and_ov_are_the_products_of_each_heads_own_matrices(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    assert isinstance(model.QK, FactoredMatrix)
    assert isinstance(model.OV, FactoredMatrix)
    heads, group = model.cfg.n_heads, model.cfg.n_heads // model.cfg.n_kv_heads
    assert model.QK.shape == model.OV.shape == (2, heads, 12, 12)
    assert model.QK.mdim == model.OV.mdim == 4
    for layer, block in enumerate(model.blocks):
        for head in range(heads):
            QK = block.attn.W_Q[head] @ block.attn.W_K[head // group].T
            OV = block.attn.W_V[head // group] @ block.attn.W_O[head]
            assert torch.allclose(model.QK[layer, head].AB, QK, atol=1e-13)
            assert torch.allclose(model.OV[layer, head].AB, OV, atol=1e-13)


def test_the_qk_circuit_gives_the_attention_scores() -> None:
    model = tiny_model(normalization_type=None, **GROUPED)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.b_Q)
        torch.nn.init.zeros_(block.attn.b_K)
    _, cache = model.run_with_cache(tiny_tokens(batch=1))
    stream, scores = cache["resid_pre", 1][0], cache["attn_scores", 1][0]
    allowed = torch.ones(7, 7).tril().bool()
    for head in range(6):
        expected = stream @ model.QK[1, head].AB @ stream.T / 2
        assert torch.allclose(scores[head][allowed], expected[allowed], atol=1e-10)


def dense_scores(model: HookedTransformer, mode: str) -> Tensor:
    """||W_OV W_read|| / (||W_OV|| ||W_read||), multiplied out head by head."""
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    OV, QK = model.OV.AB, model.QK.AB
    reads = {"Q": QK, "K": QK.mT, "V": OV}[mode]
    scores = torch.zeros(layers, heads, layers, heads, dtype=OV.dtype)
    for writer in range(layers):
        for reader in range(writer + 1, layers):
            for head in range(heads):
                for other in range(heads):
                    written, read = OV[writer, head], reads[reader, other]
                    scores[writer, head, reader, other] = (written @ read).norm() / (written.norm() * read.norm())
    return scores


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2, "d_head": 3}])
def test_composition_scores_are_those_of_the_dense_matrices(mode: Any, changes: dict[str, Any]) -> None:
    model = tiny_model(n_layers=3, **changes)
    scores = model.all_composition_scores(mode)
    assert scores.shape == (3, model.cfg.n_heads, 3, model.cfg.n_heads)
    assert torch.allclose(scores, dense_scores(model, mode), atol=1e-12)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_a_head_composes_with_later_layers_only(mode: Any) -> None:
    scores = tiny_model(n_layers=3).all_composition_scores(mode)
    for writer in range(3):
        for reader in range(3):
            assert bool((scores[writer, :, reader] > 0).all()) is (reader > writer)
            assert bool((scores[writer, :, reader] == 0).all()) is (reader <= writer)


@pytest.mark.usefixtures("no_type_checks")
def test_another_mode_of_composition_raises() -> None:
    with pytest.raises(ValueError, match="composition is by 'Q', 'K' or 'V', not 'O'"):
        tiny_model().all_composition_scores("O")  # type: ignore[arg-type]


def test_head_labels_are_an_attribute_and_may_be_called() -> None:
    model = tiny_model()
    labels = ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert model.all_head_labels == labels
    assert model.all_head_labels() == labels
    assert isinstance(model.all_head_labels, list)
    assert model.all_head_labels[4] == "L1H1"


# Biases


@pytest.mark.parametrize("mlp_input", [False, True])
@pytest.mark.parametrize("include_mlp_biases", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_accumulated_bias_is_the_sum_of_what_was_written_before(
    layer: int, mlp_input: bool, include_mlp_biases: bool
) -> None:
    model = tiny_model(n_layers=3)
    expected = torch.zeros(12, dtype=torch.float64)
    for block in model.blocks[:layer]:
        expected = expected + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0)
    if mlp_input:
        expected = expected + model.blocks[layer].attn.b_O
    found = model.accumulated_bias(layer, mlp_input=mlp_input, include_mlp_biases=include_mlp_biases)
    assert torch.allclose(found, expected, atol=1e-14)


def test_the_accumulated_bias_is_what_the_stream_holds_when_all_weights_are_zero() -> None:
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".W_" in name:
                parameter.zero_()
        stream = model(tiny_tokens(), stop_at_layer=2)
    assert torch.allclose(stream, model.accumulated_bias(2).expand_as(stream), atol=1e-14)


def test_the_accumulated_bias_of_an_attention_only_model_is_attentions() -> None:
    model = tiny_model(attn_only=True, act_fn=None)
    assert torch.allclose(model.accumulated_bias(2), model.b_O.sum(0), atol=1e-14)


@pytest.mark.parametrize(("layer", "mlp_input"), [(3, False), (-1, False), (2, True)])
def test_the_accumulated_bias_of_a_layer_that_is_not_there_raises(layer: int, mlp_input: bool) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} is out of range"):
        tiny_model().accumulated_bias(layer, mlp_input=mlp_input)


def test_biases_that_do_not_add_up_raise() -> None:
    with pytest.raises(ValueError, match="this model normalises biases before they reach the stream"):
        tiny_model(use_normalization_before_and_after=True).accumulated_bias(1)
    experts = tiny_model(num_experts=3, experts_per_token=1)
    with pytest.raises(ValueError, match="pass include_mlp_biases=False"):
        experts.accumulated_bias(1)
    assert torch.allclose(experts.accumulated_bias(1, include_mlp_biases=False), experts.b_O[0], atol=1e-14)


def test_n_params_total_counts_every_parameter() -> None:
    # Embeddings, positions, unembedding with bias; per block attention, MLP and two norms; the final norm.
    attention = 4 * 12 * 12 + 4 * 12
    mlp = 2 * 12 * 48 + 48 + 12
    expected = 20 * 12 + 16 * 12 + (12 * 20 + 20) + 2 * (attention + mlp + 2 * 24) + 24
    assert tiny_model().n_params_total == expected


# Singular vectors


def up_to_sign(found: Tensor, expected: Tensor) -> bool:
    """Whether columns agree, each up to its sign."""
    found = found[:, 0]
    signs = (found * expected).sum(0).sign()
    return found.shape == expected.shape and torch.allclose(found, expected * signs, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, GROUPED])
def test_the_singular_vectors_of_ov_are_those_of_the_dense_product(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    for head in range(model.cfg.n_heads):
        _, _, Vh = torch.linalg.svd(model.OV[1, head].AB)
        found = SVDInterpreter(model).get_singular_vectors("OV", layer_index=1, num_vectors=4, head_index=head)
        assert found.shape == (20, 1, 4)
        assert up_to_sign(found, model.W_U.T @ Vh[:4].T)


@pytest.mark.parametrize("circuit", ["OV", "QK"])
def test_both_sides_of_a_heads_singular_vectors_are_shown_as_tokens(circuit: Any) -> None:
    model = tiny_model(normalization_type="RMS", n_heads=4, n_key_value_heads=2, d_head=3)
    found = circuit_vectors(model, 1, 3, circuit, n_vectors=3)
    attn, gain = model.blocks[1].attn, model.blocks[1].ln1.w[:, None]
    if circuit == "OV":
        matrix, unembed = (gain * attn.W_V[1]) @ attn.W_O[3], (model.ln_final.w[:, None] * model.W_U).T
    else:
        matrix, unembed = (gain * attn.W_Q[3]) @ (gain * attn.W_K[1]).T, model.W_E
    U, S, Vh = torch.linalg.svd(matrix.detach())
    torch.testing.assert_close(found.values, S[:3])
    assert up_to_sign(found.left[:, None], model.W_E @ U[:, :3])
    assert up_to_sign(found.right[:, None], unembed @ Vh[:3].T)
    # Together they give the matrix back, so that their signs belong together.
    torch.testing.assert_close((found.left * found.values) @ found.right.T, (model.W_E @ matrix @ unembed.T).detach())
    assert (found.right.gather(0, found.right.abs().argmax(0, keepdim=True)) > 0).all()
    left, right = found.top_tokens(0, k=2)
    assert left[0] == found.left[:, 0].argmax()
    assert right == found.right[:, 0].topk(2).indices.tolist()


def test_half_precision_is_decomposed_in_single() -> None:
    half = tiny_model(dtype=torch.float32).to(torch.bfloat16)
    for circuit in ("OV", "QK"):
        assert circuit_vectors(half, 0, 1, circuit, n_vectors=2).left.dtype == torch.float32  # type: ignore[arg-type]
    for vector_type in ("w_in", "w_out"):
        found = SVDInterpreter(half).get_singular_vectors(vector_type, layer_index=0, num_vectors=2)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
    assert SVDInterpreter(half).get_singular_vectors("OV", 0, 2, head_index=1).dtype == torch.float32


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"circuit": "VO"}, "circuit is 'OV' or 'QK'"),
        ({"head": 3}, "no head 3"),
        ({"layer": 2}, "no layer 2"),
        ({"n_vectors": 5}, "n_vectors is in 1-4"),
    ],
)
def test_a_circuit_that_is_not_there_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        circuit_vectors(tiny_model(), **{"layer": 0, "head": 0, "n_vectors": 2, **arguments})
    with pytest.raises(ValueError, match="vectors are 0-1 and k is in 1-20"):
        circuit_vectors(tiny_model(), 0, 0, n_vectors=2).top_tokens(2)


def test_the_singular_vectors_of_w_out_are_those_of_what_it_writes() -> None:
    model = tiny_model()
    _, _, Vh = torch.linalg.svd(model.blocks[1].mlp.W_out)
    found = SVDInterpreter(model).get_singular_vectors("w_out", layer_index=1, num_vectors=5)
    assert up_to_sign(found, model.W_U.T @ Vh[:5].T)


@pytest.mark.parametrize("folded", [False, True])
def test_the_singular_vectors_of_w_in_are_those_of_what_it_reads(folded: bool) -> None:
    model = tiny_model(normalization_type="RMS")
    reads = model.blocks[1].ln2.w[:, None] * model.blocks[1].mlp.W_in
    if folded:
        model.fold_layer_norm()
    U, _, _ = torch.linalg.svd(reads)
    found = SVDInterpreter(model).get_singular_vectors("w_in", layer_index=1, num_vectors=12)
    assert up_to_sign(found, model.W_U.T @ U)


def test_by_default_there_are_ten_vectors_and_no_gradient() -> None:
    found = SVDInterpreter(tiny_model()).get_singular_vectors("w_out", layer_index=0)
    assert found.shape == (20, 1, 10)
    assert not found.requires_grad


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("changes", "arguments", "match"),
    [
        ({}, {"vector_type": "QK", "layer_index": 0}, "vector_type is 'OV', 'w_in' or 'w_out', not 'QK'"),
        ({}, {"vector_type": "w_in", "layer_index": 2}, "layer 2 is out of range"),
        ({}, {"vector_type": "w_in", "layer_index": -1}, "layer -1 is out of range"),
        ({}, {"vector_type": "OV", "layer_index": 0}, "'OV' needs head_index in 0-2, got None"),
        ({}, {"vector_type": "OV", "layer_index": 0, "head_index": 3}, "'OV' needs head_index in 0-2, got 3"),
        ({}, {"vector_type": "w_out", "layer_index": 0, "num_vectors": 13}, "num_vectors 13 is not in 1-12"),
        ({}, {"vector_type": "w_out", "layer_index": 0, "num_vectors": 0}, "num_vectors 0 is not in 1-12"),
        ({}, {"vector_type": "OV", "layer_index": 0, "head_index": 0, "num_vectors": 5}, "5 is not in 1-4"),
        ({"attn_only": True, "act_fn": None}, {"vector_type": "w_in", "layer_index": 0}, "no plain MLP"),
        ({"num_experts": 2, "experts_per_token": 1}, {"vector_type": "w_out", "layer_index": 0}, "no plain MLP"),
    ],
)
def test_singular_vectors_that_are_not_there_raise(
    changes: dict[str, Any], arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        SVDInterpreter(tiny_model(**changes)).get_singular_vectors(**arguments)


# Memory layout


def through_a_file(model: HookedTransformer) -> HookedTransformer:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_a_loaded_state_dict(model: HookedTransformer) -> HookedTransformer:
    fresh = HookedTransformer(model.cfg)
    fresh.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    return fresh


def processed(model: HookedTransformer) -> HookedTransformer:
    model.process_weights_(refactor_factored_attn_matrices=True)
    return model


def after_training(model: HookedTransformer) -> HookedTransformer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(tiny_tokens(), return_type="loss").backward()
    optimizer.step()
    return model


WAYS: dict[str, Callable[[HookedTransformer], HookedTransformer]] = {
    "as built": lambda model: model,
    "to float32 and back": lambda model: model.to(torch.float32).to(torch.float64),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "deepcopy": copy.deepcopy,
    "loaded state dict": with_a_loaded_state_dict,
    "torch.save": through_a_file,
    "processed": processed,
    "trained": after_training,
}


def assert_one_matrix_per_projection(model: HookedTransformer) -> None:
    for block in model.blocks:
        for name in ("W_Q", "W_K", "W_V"):
            W = getattr(block.attn, name)
            matrix = W.mT.flatten(0, 1)  # [(head d_head) d_model], what the GEMM is given
            assert matrix.untyped_storage().data_ptr() == W.untyped_storage().data_ptr(), name
            assert 1 in matrix.stride(), name  # so that the GEMM takes it as it lies
        W_O = block.attn.W_O
        assert W_O.flatten(0, 1).untyped_storage().data_ptr() == W_O.untyped_storage().data_ptr()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes", [{}, {"n_heads": 4, "d_head": 3, "n_key_value_heads": 4}], ids=["plain", "four heads"]
)
def test_a_projection_is_one_matrix_in_memory(way: str, changes: dict[str, Any]) -> None:
    assert_one_matrix_per_projection(WAYS[way](tiny_model(**changes)))


def test_a_grouped_projection_is_one_matrix_in_memory() -> None:
    assert_one_matrix_per_projection(with_a_loaded_state_dict(tiny_model(**GROUPED)))


@pytest.mark.parametrize("processing", [True, False])
def test_a_projection_of_a_loaded_checkpoint_is_one_matrix_in_memory(processing: bool, gpt2_folder: Path) -> None:
    load = HookedTransformer.from_pretrained if processing else HookedTransformer.from_pretrained_no_processing
    assert_one_matrix_per_projection(load(gpt2_folder))
    assert_one_matrix_per_projection(load(gpt2_folder, dtype=torch.bfloat16))


def test_a_forward_pass_never_copies_a_projection() -> None:
    model = HookedTransformer(tiny_config(d_model=64, n_heads=4, d_mlp=8))
    tokens = tiny_tokens(batch=1, pos=2)
    size = model.blocks[0].attn.W_Q.numel()
    sized: list[str] = []

    class Watch(TorchDispatchMode):
        """Notes every operation whose result is as large as a projection."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() == size:
                sized.append(str(func))
            return out

    with torch.no_grad(), Watch():
        model(tokens)
    assert len(sized) > 0
    assert not {name for name in sized if "clone" in name or "copy" in name}


def test_assigning_a_state_dict_is_refused_since_it_would_give_up_the_layout() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="leave assign=False"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_a_head_that_writes_nothing_composes_with_nothing() -> None:
    model = tiny_model(n_layers=2)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] = 0.0
    scores = model.all_composition_scores("K")
    assert not scores.isnan().any()
    assert (scores[0, 1] == 0).all()
    assert (scores[0, 0, 1] > 0).all()


@pytest.mark.parametrize("which", ["w_in", "w_out"])
def test_a_head_index_has_no_effect_on_the_singular_vectors_of_an_mlp(which: Any) -> None:
    interpreter = SVDInterpreter(tiny_model())
    plain = interpreter.get_singular_vectors(which, 1, 3)
    assert torch.equal(interpreter.get_singular_vectors(which, layer_index=1, num_vectors=3, head_index=2), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_composition_and_singular_vectors_of_low_precision_weights_are_those_of_single(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=torch.float32, n_heads=4, d_head=3, n_key_value_heads=2).to(dtype)
    single = copy.deepcopy(model).float()
    for mode in ("Q", "K", "V"):
        low = model.all_composition_scores(mode)
        assert low.dtype == dtype
        assert torch.equal(low, single.all_composition_scores(mode).to(dtype))
    for options in ({"vector_type": "OV", "head_index": 3}, {"vector_type": "w_in"}, {"vector_type": "w_out"}):
        low = SVDInterpreter(model).get_singular_vectors(layer_index=1, num_vectors=2, **options)
        assert torch.equal(low, SVDInterpreter(single).get_singular_vectors(layer_index=1, num_vectors=2, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_refactoring_low_precision_weights_rounds_what_single_gives(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=torch.float32, d_mlp=16).to(dtype)
    model.fold_value_biases()
    single = copy.deepcopy(model).float()
    model.refactor_factored_attn_matrices()
    single.refactor_factored_attn_matrices()
    for name, value in model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, single.state_dict()[name].to(dtype)), name
