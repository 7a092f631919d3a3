"""Hook points: their names, torch's own hooks, the tensors that hooks share, and modules in their places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hooked_lm import HookedTransformer, HookPoint, Intervention
from tests.helpers import tiny_model, tiny_tokens
from tests.hooks_helpers import FIRST, SECOND, SUBJECTS, Network, Subject, look, subject_of


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


# The registry


def test_setup_names_every_hook_point_after_its_place() -> None:
    network = Network()
    assert list(network.hook_dict) == ["hook_embed", FIRST, SECOND]
    assert network.hook_dict[SECOND] is network.blocks[1].hook_resid_pre
    assert [point.name for point in network.hook_points()] == list(network.hook_dict)
    assert network.hook_names() == list(network.hook_dict)
    assert network.mod_dict["blocks.1.linear"] is network.blocks[1].linear
    network.extra = HookPoint()
    network.setup()
    assert network.extra.name == "extra"
    assert "extra" in network.hook_dict
    assert not any("hook" in name for name in network.state_dict())


def test_hooks_leave_the_state_dict_alone(subject: Subject) -> None:
    before = list(subject.model.state_dict())
    subject.model.add_hook(FIRST, look)
    assert list(subject.model.state_dict()) == before


@pytest.mark.parametrize(
    "setter", ["set_use_attn_result", "set_use_split_qkv_input", "set_use_attn_in", "set_use_hook_mlp_in"]
)
def test_the_flags_change_no_activation_and_no_hook_point(setter: str) -> None:
    model: HookedTransformer = tiny_model(n_key_value_heads=1)
    tokens, names = tiny_tokens(), list(model.hook_dict)
    clean, clean_cache = model.run_with_cache(tokens)
    for value in (True, False):
        assert getattr(model, setter)(value) is None
        assert getattr(model.cfg, setter.removeprefix("set_")) is value
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, clean, rtol=0, atol=1e-12)
        for name, tensor in clean_cache.items():
            torch.testing.assert_close(cache[name], tensor, rtol=0, atol=1e-12)
        assert list(model.hook_dict) == names


def test_torchs_own_hooks_run_at_a_hook_point_beside_ours() -> None:
    model, ran = tiny_model(), []
    point = model.hook_dict["blocks.0.hook_resid_mid"]
    plain = model(tiny_tokens())
    handles = [
        point.register_forward_pre_hook(lambda module, args: ran.append("before")),
        point.register_forward_hook(lambda module, args, out: (ran.append("after"), 2 * out)[1]),
        point.register_full_backward_hook(lambda module, grad_in, grad_out: ran.append("gradient")),
    ]
    point.add_hook(lambda x, hook: ran.append("ours"))
    edited = model(tiny_tokens())
    edited.sum().backward()
    assert ran == ["before", "ours", "after", "gradient"]
    model.reset_hooks()
    doubled = model.run_with_hooks(
        tiny_tokens(), fwd_hooks=[("blocks.0.hook_resid_mid", lambda x, hook: x)], bwd_hooks=[]
    )
    torch.testing.assert_close(edited, doubled)
    assert not torch.allclose(edited, plain)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(tiny_tokens()), plain)


def test_hooks_on_one_point_share_one_tensor_with_which_the_run_goes_on() -> None:
    model, kept = tiny_model(), []
    tokens = tiny_tokens()

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.append(x)

    def halve(x: Tensor, hook: HookPoint) -> None:
        x *= 0.5

    name = "blocks.0.hook_resid_post"
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, keep), (name, halve), (name, keep)])
    assert kept[0] is kept[1]
    halved = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 0.5 * x)])
    torch.testing.assert_close(logits, halved, rtol=0, atol=1e-12)
    # What the first hook kept is what the gradient flows through.
    gradient = torch.autograd.grad(logits[0, -1, 3], kept[0])[0]
    onto = kept[0].detach().requires_grad_()
    expected = torch.autograd.grad(model(onto, start_at_layer=1)[0, -1, 3], onto)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_what_a_reading_hook_keeps_never_changes_though_hooks_before_and_after_it_write(gradients: bool) -> None:
    model, name, kept = tiny_model(), "blocks.0.hook_resid_post", []

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept.append(x)

    def double_in_place(x: Tensor, hook: HookPoint) -> None:
        x *= 2

    keep.reads_only = True  # type: ignore[attr-defined]
    with torch.set_grad_enabled(gradients):
        _, cache = model.run_with_cache(tiny_tokens())
        hooks = [(name, one) for one in (keep, double_in_place, keep, double_in_place, keep)]
        logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=hooks)
        expected = model.run_with_hooks(tiny_tokens(), fwd_hooks=[(name, lambda x, hook: 4 * x)])
    for factor, one in zip((1, 2, 4), kept, strict=True):
        torch.testing.assert_close(one, factor * cache[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_a_stream_kept_in_one_hook_is_differentiated_from_another() -> None:
    """As replacement models do: what the MLP writes passes for a function of what it read, with the error frozen."""
    model, kept = tiny_model(), {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept["in"] = x

    def skip(x: Tensor, hook: HookPoint) -> Tensor:
        linear = kept["in"] * 3.0
        return linear + (x - linear).detach()

    name = "blocks.0.hook_resid_mid"
    hooks = [(name, lambda x, hook: None), (name, keep), ("blocks.0.hook_mlp_out", skip)]
    logits = model.run_with_hooks(tiny_tokens(), fwd_hooks=hooks)
    torch.testing.assert_close(logits, model(tiny_tokens()), rtol=0, atol=1e-12)
    came = torch.autograd.grad(logits[0, -1, 3], kept["in"], retain_graph=True)[0]
    onto = kept["in"].detach().requires_grad_()
    after = onto + 3.0 * onto + (model.blocks[0].mlp_output(kept["in"]) - 3.0 * kept["in"]).detach()
    expected = torch.autograd.grad(model(after, start_at_layer=1)[0, -1, 3], onto)[0]
    torch.testing.assert_close(came, expected, rtol=0, atol=1e-12)


def test_a_hook_that_returns_somebody_elses_tensor_does_not_expose_it_to_the_next() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny_tokens(seed=5))
        name = "blocks.0.hook_resid_post"
        before = cache[name].clone()

        def wipe(x: Tensor, hook: HookPoint) -> None:
            x.zero_()

        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name]), (name, wipe)])
        assert torch.equal(cache[name], before)
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: cache[name]), ("blocks.1.hook_resid_pre", wipe)])
        assert torch.equal(cache[name], before)


def test_a_hook_may_change_how_many_prompts_there_are_and_no_other_axis() -> None:
    model, tokens = tiny_model(), tiny_tokens(2, 5)
    name = "blocks.0.hook_resid_pre"
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: torch.cat((x, x[:1])))])
    torch.testing.assert_close(logits, model(tokens[[0, 1, 0]]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"returned shape \(2, 4, 12\), but the activation has shape \(2, 5, 12\)"):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x[:, 1:])])


def test_the_gradient_passes_a_later_point_first_though_both_are_shown_one_tensor() -> None:
    model, seen = tiny_model(), {}
    hooks = [
        ("blocks.0.hook_resid_post", lambda grad, hook: seen.update(before=grad.clone())),
        ("blocks.1.hook_resid_pre", lambda grad, hook: 3 * grad),
        ("blocks.1.hook_resid_pre", lambda grad, hook: seen.update(after=grad.clone())),
    ]
    with model.hooks(bwd_hooks=hooks):
        model(tiny_tokens(), return_type="loss").backward()
    assert torch.equal(seen["before"], seen["after"])


class Doubled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", [name for name, point in tiny_model().hook_dict.items() if point.differentiable])
def test_a_module_in_any_hook_points_place_is_run_as_a_hook_would_be(name: str) -> None:
    model, tokens = tiny_model(), tiny_tokens()
    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 2 * x)])
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, Doubled())
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    model.setup()
    assert name not in model.hook_dict
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)


def test_an_intervention_selects_features_of_an_axis_of_ones_own() -> None:
    class Spliced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(12, 20, dtype=torch.float64))
            self.hook_features = HookPoint("batch pos d_sae")

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_features((x @ self.W).relu()) @ self.W.T

    model, tokens = tiny_model(), tiny_tokens()
    model.blocks[0].hook_mlp_out = Spliced()
    model.setup()
    site = "blocks.0.hook_mlp_out.hook_features"
    edit = Intervention(site, "zero", feature=(3, 19), pos=-1)

    def zero(x: Tensor, hook: HookPoint) -> None:
        x[:, -1, [3, 19]] = 0

    came = model.run(tokens, interventions=[edit])
    torch.testing.assert_close(came, model.run_with_hooks(tokens, fwd_hooks=[(site, zero)]), rtol=0, atol=1e-12)
    assert not torch.equal(came, model(tokens))
    with pytest.raises(ValueError, match="there is no feature 20"):
        model.run(tokens, interventions=[Intervention(site, "zero", feature=20)])


def test_a_copy_of_a_model_has_hook_points_of_its_own() -> None:
    model = tiny_model()
    twin = copy.deepcopy(model)
    called = []
    twin.add_hook("blocks.0.hook_resid_pre", lambda x, hook: called.append(hook))
    model(tiny_tokens())
    assert called == []
    twin(tiny_tokens())
    assert called == [twin.blocks[0].hook_resid_pre] == [twin.hook_dict["blocks.0.hook_resid_pre"]]
    model.blocks[0].hook_resid_pre = HookPoint("batch pos d_model")
    assert model.blocks[0].hook_resid_pre is not model.hook_dict["blocks.0.hook_resid_pre"]


# Which hooks are attached


def nothing(value: Tensor, hook: HookPoint) -> None: ...


def test_attached_hooks_are_listed_by_name_direction_and_permanence() -> None:
    model = tiny_model()
    assert model.list_hooks() == {}
    model.add_hook("hook_embed", nothing)
    model.add_perma_hook("blocks.0.attn.hook_q", nothing)
    model.add_hook("blocks.1.attn.hook_q", nothing, dir="bwd")
    query, later = "blocks.0.attn.hook_q", "blocks.1.attn.hook_q"
    assert list(model.list_hooks()) == ["hook_embed", query, later]
    assert list(model.list_hooks(dir="fwd")) == ["hook_embed", query]
    assert list(model.list_hooks(dir="bwd")) == [later]
    assert list(model.list_hooks(including_permanent=False)) == ["hook_embed", later]
    assert list(model.list_hooks("*hook_q")) == [query, later]
    assert list(model.list_hooks(name_filter=lambda name: "attn" in name, dir="fwd")) == [query]
    (handle,) = model.list_hooks()[query]
    assert handle.is_permanent
    assert handle.user_hook is nothing
    with model.hooks([("hook_embed", nothing)]):
        assert [one.context_level for one in model.list_hooks("hook_embed")["hook_embed"]] == [None, 1]


def test_options_that_select_hooks_are_checked_everywhere() -> None:
    model = tiny_model()
    point = model.hook_dict["hook_embed"]
    by_direction = [
        lambda wrong: point.has_hooks(dir=wrong),
        lambda wrong: point.remove_hooks(dir=wrong),
        lambda wrong: point.add_hook(nothing, dir=wrong),
        lambda wrong: model.add_hook("hook_embed", nothing, dir=wrong),
        lambda wrong: model.list_hooks(dir=wrong),
        lambda wrong: model.reset_hooks(direction=wrong),
        lambda wrong: model.remove_all_hook_fns(direction=wrong),
    ]
    for call in by_direction:
        for wrong in ("forward", "", None, 1):
            with pytest.raises(ValueError, match="direction"):
                call(wrong)
    by_level = [
        lambda wrong: point.has_hooks(level=wrong),
        lambda wrong: point.remove_hooks(level=wrong),
        lambda wrong: point.add_hook(nothing, level=wrong),
        lambda wrong: model.reset_hooks(level=wrong),
    ]
    for call in by_level:
        for wrong in ("fwd", 1.5, True):
            with pytest.raises(TypeError, match="level is an integer"):
                call(wrong)
