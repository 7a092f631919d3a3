"""With an overridden component, a number computed from a run is right or raises, and one from weights raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hooked_lm import HookedTransformer, SVDInterpreter
from hooked_lm.circuits.composition import head_composition
from hooked_lm.circuits.direct_logit import hooks_for_attribution, logit_attribution
from hooked_lm.circuits.full_circuits import full_ov_circuit, full_qk_circuit, token_embeddings
from hooked_lm.circuits.function_vectors import function_vector
from hooked_lm.circuits.heads import copying_scores, matching_scores
from hooked_lm.circuits.induction import k_composition_qk_circuit
from hooked_lm.circuits.svd import circuit_vectors
from hooked_lm.components import MLP, Attention, LayerNorm, TransformerBlock, Unembed
from hooked_lm.components.stock import not_stock
from tests.helpers import tiny_model, tiny_tokens

Override = Callable[[HookedTransformer], Any]


class LoudAttention(Attention):
    def write(self, z: Tensor) -> Tensor:
        return 2.0 * super().write(z)


class LoudMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class LoudNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class LoudUnembed(Unembed):
    def forward(self, x: Tensor) -> Tensor:
        return self.hook_out(2.0 * (self.hook_in(x) @ self.W_U + self.b_U))


class LoudBlock(TransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().forward(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, weights: Tensor) -> Tensor:
        return 2.0 * weights


def of_class(path: str, kind: type[nn.Module]) -> Override:
    def override(model: HookedTransformer) -> None:
        model.get_submodule(path).__class__ = kind

    return override


def method_on_the_instance(model: HookedTransformer) -> None:
    write = model.blocks[0].attn.write
    model.blocks[0].attn.write = lambda z: 2.0 * write(z)  # type: ignore[method-assign]


def replaced(path: str) -> Override:
    def override(model: HookedTransformer) -> None:
        model.set_submodule(path, nn.Linear(12, 12, dtype=torch.float64).requires_grad_(False))

    return override


def torch_hook(path: str) -> Override:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, output: 2.0 * output)


ATTENTION: dict[str, Override] = {
    "a subclass of attention": of_class("blocks.0.attn", LoudAttention),
    "a method set on attention": method_on_the_instance,
    "a torch hook on attention": torch_hook("blocks.0.attn"),
    "parametrised output weights": lambda model: parametrize.register_parametrization(
        model.blocks[0].attn, "W_O", Doubled()
    ),
    "a subclass of the norm before attention": of_class("blocks.0.ln1", LoudNorm),
    "another module for the norm before attention": replaced("blocks.0.ln1"),
    "a subclass of the block": of_class("blocks.0", LoudBlock),
}
MLPS: dict[str, Override] = {
    "a subclass of the MLP": of_class("blocks.0.mlp", LoudMLP),
    "a torch hook on the MLP": torch_hook("blocks.0.mlp"),
    "a subclass of the norm before the MLP": of_class("blocks.0.ln2", LoudNorm),
}
ENDS: dict[str, Override] = {
    "a subclass of the final norm": of_class("ln_final", LoudNorm),
    "another module for the final norm": replaced("ln_final"),
    "a torch hook on the final norm": torch_hook("ln_final"),
    "a subclass of the unembedding": of_class("unembed", LoudUnembed),
    "a torch hook on the unembedding": torch_hook("unembed"),
}


def overrides(*groups: dict[str, Override]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("override", [pytest.param(one, id=name) for g in groups for name, one in g.items()])


# From a run


@pytest.mark.parametrize("split", ["component", "head", "source", "neuron"])
@overrides(ATTENTION, MLPS, ENDS)
def test_logit_attribution_sums_to_the_logit_of_the_overridden_model_or_raises(override: Override, split: Any) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    override(model)
    logits, cache = model.run_with_cache(tokens, names_filter=[*hooks_for_attribution(model, split)])
    try:
        found = logit_attribution(cache, 3, split=split)
    except ValueError as error:
        if "a component computes something else" not in str(error):
            raise
    else:
        torch.testing.assert_close(found.values.sum(0), logits[:, -1, 3], rtol=1e-9, atol=1e-9)


@overrides(ENDS)
def test_logit_attribution_raises_where_the_end_of_the_model_is_overridden(override: Override) -> None:
    model = tiny_model()
    override(model)
    _, cache = model.run_with_cache(tiny_tokens())
    with pytest.raises(ValueError, match=r"a component computes something else \((ln_final|unembed) "):
        logit_attribution(cache, 3)


def test_components_count_whole_where_attention_or_mlp_is_overridden_and_their_parts_raise() -> None:
    model = tiny_model()
    for override in (ATTENTION["a subclass of attention"], MLPS["a subclass of the MLP"]):
        override(model)
    _, cache = model.run_with_cache(tiny_tokens())
    assert logit_attribution(cache, 3).off < 1e-12
    with pytest.raises(ValueError, match=r"the parts of 0_attn_out sum to .*is a LoudAttention, which overrides write"):
        logit_attribution(cache, 3, split="head")
    with pytest.raises(ValueError, match="the parts of 0_mlp_out sum to"):
        logit_attribution(cache, 3, split="neuron")


# From weights

OF_ATTENTION: dict[str, Callable[[HookedTransformer], Any]] = {
    "full OV circuit": lambda model: full_ov_circuit(model, 0, 1),
    "full QK circuit": lambda model: full_qk_circuit(model, 0, 1),
    "copying": lambda model: copying_scores(model, verbose=False),
    "matching": lambda model: matching_scores(model, verbose=False),
    "composition": lambda model: head_composition(model, "K", verbose=False),
    "K composition": lambda model: k_composition_qk_circuit(model, (0, 0), (1, 1)),
    "singular vectors": lambda model: circuit_vectors(model, 0, 1, "QK", 2),
    "singular vectors of an OV circuit": lambda model: SVDInterpreter(model).get_singular_vectors("OV", 0, 2, 1),
    "function vector": lambda model: function_vector(model, torch.ones(2, 3, 4, dtype=torch.float64), [(0, 1)]),
}
OF_THE_END: dict[str, Callable[[HookedTransformer], Any]] = {
    "full OV circuit": OF_ATTENTION["full OV circuit"],
    "copying": OF_ATTENTION["copying"],
    "singular vectors": lambda model: circuit_vectors(model, 0, 1, "OV", 2),
}


def small() -> HookedTransformer:
    return tiny_model(n_layers=2, n_heads=3, d_head=4, d_model=12)


@pytest.mark.parametrize("compute", OF_ATTENTION.values(), ids=OF_ATTENTION.keys())
@overrides(ATTENTION)
def test_circuits_of_overridden_attention_raise(override: Override, compute: Callable[..., Any]) -> None:
    model = small()
    compute(model)
    override(model)
    with pytest.raises(ValueError, match=r"computed from weights alone, .*blocks\.0.*the result would not describe"):
        compute(model)


@pytest.mark.parametrize("compute", OF_THE_END.values(), ids=OF_THE_END.keys())
@overrides(ENDS)
def test_circuits_that_end_in_overridden_logits_raise(override: Override, compute: Callable[..., Any]) -> None:
    model = small()
    override(model)
    with pytest.raises(ValueError, match=r"computed from weights alone, .*(ln_final|unembed) "):
        compute(model)


@pytest.mark.parametrize("kind", ["w_in", "w_out"])
@overrides(MLPS)
def test_singular_vectors_of_an_overridden_mlp_raise(override: Override, kind: Any) -> None:
    model = small()
    SVDInterpreter(model).get_singular_vectors(kind, 0, 2)
    override(model)
    with pytest.raises(ValueError, match=r"computed from weights alone, .*blocks\.0\.(mlp|ln2) "):
        SVDInterpreter(model).get_singular_vectors(kind, 0, 2)


@overrides(MLPS)
def test_an_overridden_mlp_leaves_circuits_of_heads_as_they_are(override: Override) -> None:
    model = small()
    before = full_ov_circuit(model, 0, 1).AB
    override(model)
    torch.testing.assert_close(full_ov_circuit(model, 0, 1).AB, before)


# What is run


class LoudEmbed(nn.Module):
    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.W_E, self.scale, self.ln, self.embed = embed.W_E, embed.scale, embed.ln, [embed]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed[0](tokens) ** 2


def test_an_overridden_embedding_and_first_mlp_are_run() -> None:
    model = small()
    MLPS["a subclass of the MLP"](model)
    model.embed = LoudEmbed(model.embed)  # type: ignore[assignment]
    tokens = torch.arange(20)[None]
    embedded = model.embed(tokens)
    torch.testing.assert_close(token_embeddings(model), embedded[0])
    expected = embedded + model.blocks[0].mlp(model.blocks[0].ln2(embedded))
    torch.testing.assert_close(token_embeddings(model, effective=True, verbose=False), expected[0])


def test_an_effective_embedding_of_an_overridden_block_raises() -> None:
    model = small()
    ATTENTION["a subclass of the block"](model)
    with pytest.raises(ValueError, match=r"an effective embedding .*blocks\.0 is a LoudBlock, which overrides forward"):
        token_embeddings(model, effective=True)


def test_a_clause_names_the_module_that_is_overridden() -> None:
    model = small()
    assert not_stock(model.blocks[0], name="blocks.0") is None
    MLPS["a subclass of the MLP"](model)
    assert not_stock(model.blocks[0], name="blocks.0") == "blocks.0.mlp is a LoudMLP, which overrides forward"
    assert not_stock(model.blocks[0], name="blocks.0", alone=True) is None
    assert not_stock(model.blocks[0].mlp, name="blocks.0.mlp") == "blocks.0.mlp is a LoudMLP, which overrides forward"
