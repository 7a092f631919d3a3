"""Products are `F.linear`'s, whoever computes them: torch itself, all threads on a few rows, or oneDNN."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_lm import HookedTransformer
from hooked_lm.certificate import verify
from hooked_lm.components import kernels
from hooked_lm.components import linear as products
from tests.helpers import tiny_tokens

LAYOUTS = ["[d_out d_in]", "[d_in d_out]", "columns of a wider one"]
SHAPES = [(12, 18), (7, 5), (2, 1), (1, 7)]
ROWS = [(1, 1), (1,), (), (2,), (3,), (2, 4), (17,)]

needs_onednn = pytest.mark.skipif(products.ONEDNN_LINEAR is None, reason="this torch has no oneDNN")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LARGE", 1)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of AMD, whatever this one is."""
    monkeypatch.setattr(kernels, "kernel_rule", lambda: "amd")


@pytest.fixture
def calls(by_onednn: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who has been asked for a product."""
    asked: list[str] = []

    def seen(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: asked.append(name) or function(*args)  # type: ignore[func-returns-value]

    monkeypatch.setattr(F, "linear", seen("torch", F.linear))
    if products.ONEDNN_LINEAR is not None:
        monkeypatch.setattr(products, "ONEDNN_LINEAR", seen("oneDNN", products.ONEDNN_LINEAR))
    return asked


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """What is asked once in a process is asked anew, and again afterwards."""
    asked = (kernels.processor_vendor, kernels.kernel_setting, kernels.kernel_rule)
    for one in asked:
        one.cache_clear()
    yield
    for one in asked:
        one.cache_clear()


def matrix(layout: str, d_out: int, d_in: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A weight [d_out d_in] that is stored in one of the ways that checkpoints have."""
    generator = torch.Generator().manual_seed(0)
    if layout == "[d_out d_in]":
        return torch.randn(d_out, d_in, generator=generator, dtype=dtype)
    if layout == "[d_in d_out]":
        return torch.randn(d_in, d_out, generator=generator, dtype=dtype).T
    return torch.randn(d_in, 3 * d_out, generator=generator, dtype=dtype)[:, d_out : 2 * d_out].T


def rows_of(d_in: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, d_in, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Listed(TorchDispatchMode):
    """What torch is asked to do meanwhile, as for a counter of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


# Values


@pytest.mark.usefixtures("small_is_large", "threads")
@pytest.mark.parametrize("rule", ["torch", "amd", "intel"])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["double", "single"])
def test_products_are_what_linear_gives(
    dtype: torch.dtype, exact: float, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_rule", lambda: rule)
    monkeypatch.setattr(kernels, "_MILLIONS", 1)
    wrong = []
    for layout, (d_out, d_in), biased in itertools.product(LAYOUTS, SHAPES, (True, False)):
        weight, bias = matrix(layout, d_out, d_in, dtype), torch.arange(d_out).to(dtype) if biased else None
        inputs = [rows_of(d_in, *shape, dtype=dtype) for shape in ROWS]
        inputs.append(rows_of(2 * d_in, 3, 5, dtype=dtype)[..., ::2])
        for x in inputs:
            ours, expected = products.linear(x, weight, bias), F.linear(x, weight, bias)
            if ours.shape != expected.shape or ours.dtype != dtype or not (ours - expected).abs().max() <= exact:
                wrong.append((layout, d_out, d_in, biased, tuple(x.shape)))
    assert wrong == []


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learned", ["xwb", "x", "w", "b", "xb"])
def test_derivatives_are_what_linear_gives(layout: str, learned: str, calls: list[str]) -> None:
    def derivatives(product: Callable[..., Tensor]) -> list[Tensor]:
        values = {"x": rows_of(18, 2, 4), "w": matrix(layout, 12, 18), "b": torch.arange(12).double()}
        x, w, b = (value.float().requires_grad_(name in learned) for name, value in values.items())
        inputs = [one for one in (x, w, b) if one.requires_grad]
        first = torch.autograd.grad(product(x, w, b).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs, allow_unused=True)
        return [*first, *(one for one in second if one is not None)]

    ours = derivatives(products.linear)
    assert "oneDNN" in calls
    for mine, theirs in zip(ours, derivatives(F.linear), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
def test_a_product_keeps_for_the_way_back_only_what_it_needs() -> None:
    kept: list[Tensor] = []
    x, w, b = rows_of(18, 4, dtype=torch.float32), matrix("[d_out d_in]", 12, 18, torch.float32), torch.zeros(12)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        for learned, needed in (((x,), [w]), ((w,), [x]), ((b,), []), ((x, w), [x, w])):
            for one in learned:
                one.requires_grad_()
            products.linear(x, w, b)
            assert [id(one) for one in kept] == [id(one) for one in needed]
            kept.clear()
            for one in learned:
                one.requires_grad_(False)


# Who computes


@pytest.mark.parametrize(
    ("setting", "vendor", "rule"),
    [
        ("", "AuthenticAMD", "amd"),
        ("auto", "GenuineIntel", "intel"),
        ("auto", "", "torch"),
        ("torch", "AuthenticAMD", "torch"),
        (" OneDNN ", "GenuineIntel", "amd"),
    ],
)
def test_the_rule_is_the_processors_unless_the_environment_says_otherwise(
    setting: str, vendor: str, rule: str, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    monkeypatch.setenv("HOOKED_LM_KERNELS", setting)
    monkeypatch.setattr(kernels, "processor_vendor", lambda: vendor)
    assert kernels.kernel_rule() == rule
    assert kernels.describe_kernels()["HOOKED_LM_KERNELS"] in kernels.SETTINGS


@pytest.mark.parametrize(
    ("rule", "layout", "shape", "by_rows"),
    [
        ("amd", "out in", (768, 768), {1: "parts", 2: "parts", 3: "onednn", 1024: "onednn"}),
        ("amd", "in out", (768, 768), {1: "parts", 3: "onednn"}),
        ("intel", "out in", (768, 768), {1: "torch", 8: "torch", 128: "torch"}),
        ("intel", "out in", (3072, 768), {1: "torch", 4: "torch", 8: "onednn", 192: "onednn", 193: "torch"}),
        ("intel", "out in", (50257, 768), {1: "torch", 3: "torch", 4: "onednn", 192: "onednn", 1024: "torch"}),
        ("intel", "in out", (50257, 768), {1: "torch", 8: "torch", 128: "torch"}),
        ("torch", "out in", (50257, 768), {1: "torch", 8: "torch", 128: "torch"}),
    ],
)
def test_a_product_has_the_kernel_that_was_measured_to_be_fastest(
    rule: str, layout: str, shape: tuple[int, int], by_rows: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "kernel_rule", lambda: rule)
    weight = torch.empty(shape, device="meta") if layout == "out in" else torch.empty(shape[::-1], device="meta").T
    assert {rows: kernels.product_kernel(rows, weight) for rows in by_rows} == by_rows


def test_a_setting_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setenv("HOOKED_LM_KERNELS", "mkl")
    with pytest.raises(ValueError, match=r"HOOKED_LM_KERNELS is one of auto, torch, onednn; it is 'mkl'"):
        products.linear(torch.ones(1, 512), torch.ones(512, 512))


@pytest.mark.parametrize(
    ("described", "vendor"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n", "AuthenticAMD"),
        ("Intel64 Family 6 Model 165 Stepping 2, GenuineIntel", "GenuineIntel"),
        ("CPU implementer\t: 0x41\n", ""),
    ],
)
def test_the_vendor_is_read_from_what_the_system_says(
    described: str, vendor: str, monkeypatch: pytest.MonkeyPatch, fresh_kernels: None
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: described)
    assert kernels.processor_vendor() == vendor
    kernels.processor_vendor.cache_clear()

    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("platform.processor", lambda: described)
    assert kernels.processor_vendor() == vendor


@pytest.mark.usefixtures("small_is_large")
def test_two_rows_are_shared_out_and_more_are_not(threads: int, calls: list[str]) -> None:
    weight, row = matrix("[d_out d_in]", 12, 18), torch.ones(1, 1, 18, dtype=torch.float64)
    for rows in (row, row.expand(2, 1, 18)):
        products.linear(rows, weight)
        if threads > 1:
            products.linear(rows, matrix("[d_in d_out]", 12, 18))
    assert calls == []
    products.linear(row.expand(1, 3, 18), weight)
    assert calls == ["torch"]  # oneDNN has no float64


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
def test_more_rows_are_for_onednn_unless_it_is_turned_off(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = rows_of(18, 3, dtype=torch.float32), matrix("[d_in d_out]", 12, 18, torch.float32)
    products.linear(x, weight)
    products.linear(x, matrix("[d_out d_in]", 12, 18, torch.float32))
    assert calls == ["oneDNN", "oneDNN"]
    calls.pop()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    products.linear(x, weight)
    products.linear(x, weight.clone().requires_grad_())
    assert calls == ["oneDNN", "torch", "torch"]


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
@pytest.mark.parametrize("learned", [False, True])
def test_a_matrix_with_gaps_is_not_for_onednn(calls: list[str], learned: bool) -> None:
    # It has only a reference for it, whose products of GPT-2 small's size take half a second.
    weight = matrix("columns of a wider one", 12, 18, torch.float32).requires_grad_(learned)
    products.linear(rows_of(18, 3, dtype=torch.float32), weight)
    products.linear(rows_of(12, 3, dtype=torch.float32), weight.T)
    assert calls == ["torch", "torch"]


def test_small_matrices_and_half_precision_are_left_to_torch(calls: list[str]) -> None:
    products.linear(torch.ones(8, 64), torch.ones(64, 64))
    products.linear(torch.ones(8, 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16))
    assert calls == ["torch", "torch"]


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode's own
@pytest.mark.parametrize("rows", [1, 3])
def test_what_knows_only_torchs_operations_sees_them(rows: int, calls: list[str]) -> None:
    x, weight = rows_of(18, rows, dtype=torch.float32), matrix("[d_out d_in]", 12, 18, torch.float32)
    expected = F.linear(x, weight)
    calls.clear()
    with Listed() as listed:
        products.linear(x, weight)
    assert "aten.mm" in listed.operations
    mapped = torch.func.vmap(lambda one: products.linear(one, weight))(x.expand(2, rows, 18))
    torch.testing.assert_close(mapped, expected.expand(2, rows, 12))
    with torch.no_grad():
        _, moved = torch.func.jvp(lambda one: products.linear(one, weight), (x,), (x,))
        torch.testing.assert_close(moved, expected)
        with forward_ad.dual_level():
            dual = products.linear(forward_ad.make_dual(x, x), weight)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert set(calls) == {"torch"}


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_times_a_matrix_is_nothing(dtype: torch.dtype) -> None:
    weight = matrix("[d_in d_out]", 12, 18, dtype)
    assert products.linear(torch.ones(2, 0, 18, dtype=dtype), weight).shape == (2, 0, 12)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_width_is_an_error(rows: int, layout: str) -> None:
    unchecked = inspect.unwrap(products.linear)  # as it is in use
    for width in (17, 19):
        with pytest.raises(RuntimeError, match=rf"shapes cannot be multiplied \({rows}x{width} and 18x12\)"):
            unchecked(torch.ones(rows, width), matrix(layout, 12, 18, torch.float32))


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("rows", [1, 5])
def test_what_does_not_go_together_is_an_error(rows: int) -> None:
    x, weight = torch.ones(rows, 18), matrix("[d_out d_in]", 12, 18, torch.float32)
    for wrong in ((x.double(), weight, None), (x, weight, torch.zeros(12).double())):
        with pytest.raises(RuntimeError, match="dtype"):
            products.linear(*wrong)


def test_parts_do_not_grow_with_the_threads_for_ever(by_onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    monkeypatch.setattr(products, "_LARGE", 1)
    made: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: made.append(len(a)) or bmm(a, b))
    for layout in LAYOUTS:
        products.linear(torch.ones(1, 40), matrix(layout, 50, 40, torch.float32))
    assert set(made) == {16}


# The whole model


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
def test_a_model_of_large_matrices_equals_transformers(gpt2_folder: Path, calls: list[str]) -> None:
    assert verify(str(gpt2_folder)).passed
    assert "oneDNN" in calls


@needs_onednn
@pytest.mark.usefixtures("small_is_large", "by_onednn")
def test_generation_with_large_matrices_is_the_same_with_and_without_a_cache(gpt2_folder: Path) -> None:
    model = HookedTransformer.from_pretrained(str(gpt2_folder))
    tokens = tiny_tokens(3, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    torch.testing.assert_close(
        model.generate(tokens, **options), model.generate(tokens, use_past_kv_cache=False, **options)
    )
