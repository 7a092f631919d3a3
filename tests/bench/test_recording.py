"""Records: what goes in comes out, the circumstances are kept, and nothing is written by halves."""

from __future__ import annotations

import functools
import json
import math
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooked_lm import HookedTransformer, HookedTransformerConfig, Intervention
from hooked_lm.experiments import Bench, NotKept
from hooked_lm.experiments.bench.values import pack, unpack

Pair = namedtuple("Pair", "first second")
SCALE = 3


@dataclass(frozen=True)
class Scores:
    mean: float
    by_head: Tensor

    def table(self) -> str:
        return f"mean {self.mean:.1f}"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "bench", png=False)


def model_of(seed: int = 0, **changes: object) -> HookedTransformer:
    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 6, "n_heads": 2, "d_head": 4, "d_vocab": 11, "act_fn": "gelu"}
    return HookedTransformer(HookedTransformerConfig(**{**sizes, "seed": seed, **changes}))  # type: ignore[arg-type]


def round_trip(value: object) -> object:
    packed = pack({"value": value}, "t")
    tree = json.loads(json.dumps(packed.tree))
    return unpack(tree["value"], lambda name: packed.tensors[name], Path)


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)


# Values

KEPT = {
    "none": None,
    "truth": True,
    "number": -3,
    "large": 2**80,
    "float": 0.1 + 0.2,
    "negative zero": -0.0,
    "infinite": math.inf,
    "complex": 1 - 2j,
    "text": "é\n\x00 日本",
    "bytes": b"\x00\xff",
    "list": [1, [2.5, "three"], []],
    "tuple": (1, (2,), ()),
    "dict": {"a": [1], "": {}},
    "pairs": {(0, 1): 2.0, 3: "x", None: 1},
    "set": {3, 1, 2},
    "range": range(2, 9, 3),
    "path": Path("there") / "here",
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "float32": torch.tensor([[0.1, math.inf], [math.nan, -0.0]]).nan_to_num(7.0),
    "bfloat16": torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
    "integers": torch.tensor([2**62, -1]),
    "booleans": torch.tensor([True, False]),
    "single": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "complex64": torch.tensor([1 + 2j, -3j]),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "float64 array": np.linspace(0, 1, 5),
    "int8 array": np.array([1, -2], dtype=np.int8),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_value_comes_back_as_it_was(name: str) -> None:
    assert same(round_trip(KEPT[name]), KEPT[name])


def test_not_a_number_comes_back() -> None:
    assert math.isnan(round_trip(math.nan))  # type: ignore[arg-type]
    assert bool(round_trip(torch.tensor([math.nan])).isnan().all())  # type: ignore[attr-defined]


def test_a_dataclass_comes_back_as_its_fields_and_numpy_numbers_as_numbers() -> None:
    assert round_trip(Pair(1, [2])) == {"first": 1, "second": [2]}
    assert round_trip(Scores(1.5, torch.tensor(2.0))) == {"mean": 1.5, "by_head": torch.tensor(2.0)}
    assert round_trip([np.float32(0.5), np.int64(3), np.bool_(True)]) == [0.5, 3, True]
    assert round_trip(np.array(["a", "bc"])).tolist() == ["a", "bc"]  # type: ignore[attr-defined]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_any_plain_data_comes_back(value: object) -> None:
    assert repr(round_trip(value)) == repr(value)


def test_a_kept_tensor_is_a_copy_and_a_view_keeps_only_its_part() -> None:
    whole = torch.zeros(1000)
    packed = pack({"part": whole[:2]}, "t")
    whole += 1
    assert packed.tensors["t0"].tolist() == [0.0, 0.0]
    assert packed.tensors["t0"].untyped_storage().nbytes() == 8


def test_of_an_object_without_data_the_text_is_kept_and_a_warning_says_so(bench: Bench) -> None:
    @bench.record
    def experiment() -> dict[str, object]:
        return {"number": 1, "object": object()}

    with pytest.warns(UserWarning, match=r"of the result of 'experiment' only the text is kept at result\.object"):
        experiment()
    kept = bench.get("experiment").result
    assert isinstance(kept, dict)
    assert kept["number"] == 1
    assert isinstance(kept["object"], NotKept)
    assert kept["object"].kind == "builtins.object"


# What a record holds


def test_a_recorded_function_returns_its_result_and_the_record_has_it(bench: Bench) -> None:
    @bench.record
    def experiment(x: Tensor, *more: int, scale: float = 2.0, **options: str) -> Scores:
        return Scores(float(x.sum()) * scale + sum(more), x * scale)

    found = experiment(torch.tensor([1.0, 2.0]), 3, 4, mode="fast")
    record = bench.get("experiment")
    assert found.mean == 13.0
    assert (record.name, record.version, record.error) == ("experiment", 1, None)
    assert record.result["by_head"].tolist() == [2.0, 4.0]  # type: ignore[index]
    assert record.numbers == {"mean": 13.0}
    arguments = record.arguments
    assert arguments.pop("x").tolist() == [1.0, 2.0]  # type: ignore[attr-defined]
    assert arguments == {"more": (3, 4), "scale": 2.0, "mode": "fast"}
    assert "mean 13.0" in str(record)
    assert "by_head: tensor float32 [2]" in str(record)
    assert record.seconds >= 0
    assert record.environment["packages"]["torch"] == torch.__version__
    assert experiment.__name__ == "experiment"


def test_arguments_are_those_before_the_run(bench: Bench) -> None:
    @bench.record
    def doubled(x: Tensor, seen: list[int]) -> None:
        x *= 2
        seen.append(1)

    doubled(torch.ones(2), [])
    assert bench.get("doubled").arguments["x"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    assert bench.get("doubled").arguments["seen"] == []


def test_wrong_arguments_raise_before_anything_is_recorded(bench: Bench) -> None:
    ran = []
    recorded = bench.record(lambda x: ran.append(x))
    with pytest.raises(TypeError, match="missing a required argument"):
        recorded()
    assert (ran, len(bench)) == ([], 0)


def test_an_error_is_recorded_and_raised(bench: Bench) -> None:
    @bench.record
    def failing(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError, match="division"):
        failing(0)
    failing(2)
    first, second = bench.get("failing", 1), bench.get("failing", 2)
    assert first.error is not None
    assert (first.error["class"], second.error) == ("ZeroDivisionError", None)
    assert "return 1 / x" in first.error["traceback"]
    assert [entry.outcome for entry in bench.versions("failing")] == ["ZeroDivisionError", "complete"]
    with pytest.raises(ValueError, match="failing@1 has no result: it ended with ZeroDivisionError: division by zero"):
        _ = first.result


def allocated(n: int) -> int:
    return len(torch.ones(n, dtype=torch.uint8))


def test_peak_memory_shows_what_a_run_allocates(bench: Bench) -> None:
    run = bench.record(allocated)
    run(1)
    run(200 * 2**20)
    small, large = bench.get("allocated", 1), bench.get("allocated", 2)
    if small.peak_memory is None or large.peak_memory is None:
        pytest.skip("this system does not tell a process's peak of memory")
    before = large.data["memory"]["before"]
    assert large.peak_memory - before > 150 * 2**20
    assert small.peak_memory - small.data["memory"]["before"] < 50 * 2**20


def test_a_peak_within_a_part_counts_for_the_whole(bench: Bench) -> None:
    inner = bench.record(allocated)
    outer = bench.record(name="outer")(lambda: inner(200 * 2**20) + inner(1))
    outer()
    record = bench.get("outer")
    if record.peak_memory is None:
        pytest.skip("this system does not tell a process's peak of memory")
    assert record.peak_memory - record.data["memory"]["before"] > 150 * 2**20
    assert len(record.parts) == 2


# Source


def helper(x: int) -> int:
    return x * SCALE


def with_helper(x: int) -> int:
    return helper(x) + 1


def test_the_source_has_the_helpers_and_the_constants_around_it(bench: Bench) -> None:
    bench.record(with_helper)(2)
    record = bench.get("with_helper")
    assert record.source.startswith("def with_helper(x: int) -> int:\n    return helper(x) + 1\n")
    assert "def helper(x: int) -> int:\n    return x * SCALE\n" in record.source
    assert record.data["function"]["names"] == {"helper: SCALE": "3"}


def test_another_constant_around_a_function_is_another_version_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.record(with_helper)
    run(2)
    monkeypatch.setattr("tests.bench.test_recording.SCALE", 4)
    run(2)
    first, second = bench.versions("with_helper")
    assert first.source != second.source
    found = bench.diff("with_helper@1", "with_helper@2")
    assert [str(one) for one in found.names] == ["helper: SCALE: 3 -> 4"]
    assert [str(one) for one in found.results] == ["result: 7 -> 9"]
    assert not found.source
    assert found.summary == "other values around the function; 1 result differs, by at most 2"


def test_variables_of_the_function_around_it_count(bench: Bench) -> None:
    def experiment_of(k: int) -> Callable[[], int]:
        return bench.record(name="closure")(lambda: k)

    assert [experiment_of(1)(), experiment_of(2)()] == [1, 2]
    first, second = bench.versions("closure")
    assert first.source != second.source


def test_a_tensor_or_a_model_around_a_function_is_known_again(bench: Bench) -> None:
    around, model = torch.zeros(3), model_of()
    run = bench.record(name="around")(lambda: float(around.sum()) + float(model.b_U.detach().sum()))
    run()
    run()
    around[1] = 2.0
    run()
    changed_through_data(model)
    run()
    sources = [entry.source for entry in bench.versions("around")]
    assert sources[0] == sources[1]
    assert len(set(sources)) == 3
    [tensor] = bench.diff("around@2", "around@3").names
    assert "around: tensor float32 [3]" in str(tensor)
    [changed] = bench.diff("around@3", "around@4").names
    assert "parameters, weights" in str(changed)


def test_a_file_that_was_edited_after_it_was_loaded_is_noted(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    path.write_text("def experiment(x):\n    return x + 1\n")
    loaded: dict[str, Callable[[int], int]] = {}
    exec(compile(path.read_text(), str(path), "exec"), loaded)
    run = bench.record(loaded["experiment"])
    run(1)
    path.write_text("def experiment(x):\n    return x - 1\n")
    run(1)
    assert bench.get("experiment", 1).data["notes"] == []
    assert bench.get("experiment", 2).data["notes"] == [
        "the file of the function was edited after it was loaded: the source is the newer one"
    ]


def test_a_partial_is_recorded_with_all_its_arguments(bench: Bench) -> None:
    def power(base: int, exponent: int) -> int:
        return base**exponent

    run = bench.record(name="square")(functools.partial(power, exponent=2))
    assert run(3) == 9
    assert bench.get("square").arguments == {"base": 3, "exponent": 2}
    assert "return base**exponent" in bench.get("square").source


def test_a_generator_and_a_name_with_an_at_are_refused(bench: Bench) -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="does its work after the call"):
        bench.record(numbers)
    with pytest.raises(ValueError, match="the name of an experiment is a text without @, got 'a@b'"):
        bench.record(name="a@b")(lambda: 1)


# Random numbers


def draw() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002


def test_a_seed_gives_the_same_numbers_and_leaves_the_generators_as_they_were(bench: Bench) -> None:
    run = bench.record(seed=3)(draw)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = run(), run()
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert bench.get("draw").data["random"] == {"seed": 3, "drawn": ["torch", "numpy", "python"]}


def test_a_rerun_draws_the_same_numbers_without_a_seed(bench: Bench) -> None:
    first = bench.record(draw)()
    draw()
    before = torch.get_rng_state()
    again = bench.rerun("draw@1")
    assert again.result == first
    assert again.same
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_draws_nothing_keeps_no_state(bench: Bench) -> None:
    bench.record(name="quiet")(lambda: 1)()
    assert bench.get("quiet").random_state is None
    assert "tensors.safetensors" not in bench.get("quiet").data["files"]


# Models


def test_the_record_knows_a_model_again_and_no_other(bench: Bench) -> None:
    run = bench.record(name="logits")(lambda model: model(torch.tensor([[1, 2]])))
    model, twin, other = model_of(1), model_of(1), model_of(2)
    for one in (model, twin, other):
        run(one)
    first, second, third = (bench.get("logits", version).models["model"] for version in (1, 2, 3))
    assert first == second
    assert first.differences(third) == ["other weights"]
    assert first.n_params == sum(one.numel() for one in model.parameters())


def changed_through_data(model: HookedTransformer) -> None:
    model.blocks[0].mlp.W_in.data[3, 5] += 1e-6


def changed_config(model: HookedTransformer) -> None:
    model.cfg.default_prepend_bos = False


def with_a_hook(model: HookedTransformer) -> None:
    model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_through_data, "other weights"),
        (changed_config, "other configs"),
        (with_a_hook, "hooks none and blocks.0.hook_mlp_out: with_a_hook.<locals>.<lambda>"),
        (lambda model: model.to(torch.float64), "other configs, other weights, float32 and float64"),
    ],
    ids=["weight", "config", "hook", "dtype"],
)
def test_whatever_changes_a_model_changes_its_fingerprint(
    bench: Bench, change: Callable[[HookedTransformer], object], said: str
) -> None:
    model = model_of()
    run = bench.record(name="nothing")(lambda model: None)
    run(model)
    change(model)
    run(model)
    [difference] = bench.diff("nothing@1", "nothing@2").arguments
    assert str(difference) == f"model: {said}"


def test_a_run_that_changes_its_model_is_noted(bench: Bench) -> None:
    bench.record(name="training")(changed_through_data)(model_of())
    assert bench.get("training").data["notes"] == ["the run changed model: other weights"]


def test_any_torch_module_has_a_fingerprint(bench: Bench) -> None:
    run = bench.record(name="probe")(lambda probe: None)
    layer = torch.nn.Linear(2, 2)
    run(layer)
    with torch.no_grad():
        layer.weight += 1
    run(layer)
    assert [str(one) for one in bench.diff("probe@1", "probe@2").arguments] == ["probe: other weights"]


# Again


def test_a_rerun_uses_the_recorded_arguments_and_the_model_of_this_process(bench: Bench) -> None:
    model = model_of(1)
    zero = Intervention("blocks.0.attn.hook_z", "zero", head=1)

    @bench.record
    def ablated(model: HookedTransformer, tokens: Tensor, cells: list[Intervention], one: Intervention) -> Tensor:
        return model.run(tokens, interventions=[*cells, one])

    first = ablated(model, torch.tensor([[1, 2, 3]]), [], zero)
    again = bench.rerun("ablated")
    assert torch.equal(again.result, first)  # type: ignore[arg-type]
    assert again.same
    assert again.diff.same_inputs
    assert again.record.version == 2
    assert str(again).endswith("the same source, arguments and environment; equal results")


def test_a_rerun_with_another_model_says_what_differs(bench: Bench) -> None:
    bench.record(name="bias")(lambda model: model.b_U.sum() + model.W_E[0, 0])(model_of(1))
    again = bench.rerun("bias@1", model=model_of(2))
    assert not again.same
    assert [str(one) for one in again.diff.arguments] == ["model: other weights"]
    assert again.diff.largest == pytest.approx(float((model_of(1).W_E - model_of(2).W_E)[0, 0].detach().abs()))


def test_a_rerun_asks_for_what_the_record_cannot_give_back(bench: Bench) -> None:
    run = bench.record(name="bias")(lambda model, x: 1)
    run(model_of(1), 2)
    elsewhere = Bench(bench.folder)
    with pytest.raises(
        ValueError, match=r"no function 'bias' is recorded by this process: .* bench\.rerun\('bias@1', "
    ):
        elsewhere.rerun("bias", model=model_of(1))
    elsewhere.record(name="bias")(lambda model, x: 1)
    with pytest.raises(ValueError, match=r"cannot give back model .*: give it, as in bench\.rerun\('bias@1', model="):
        elsewhere.rerun("bias")
    with pytest.raises(ValueError, match="has no argument 'mdl': model, x"):
        elsewhere.rerun("bias", mdl=1)
    assert elsewhere.rerun("bias", model=model_of(1)).same
    model = model_of(3)
    run(model, 2)
    changed_through_data(model)
    with pytest.raises(ValueError, match="cannot give back model"):
        bench.rerun("bias")


def test_a_rerun_gives_arguments_by_place_where_the_function_wants_them_so(bench: Bench) -> None:
    def places(a: int, /, b: int, *rest: int, c: int = 0) -> list[int]:
        return [a, b, *rest, c]

    bench.record(places)(1, 2, 3, 4, c=5)
    assert bench.rerun("places").result == [1, 2, 3, 4, 5]


class Counter:
    def __repr__(self) -> str:
        return "Counter()"

    def count(self, n: int, dtype: torch.dtype = torch.float32) -> int:
        return n + 1


def test_a_method_is_recorded_and_its_object_shown_by_its_text(bench: Bench) -> None:
    assert bench.record(Counter().count)(2) == 3
    bench.run(Counter.count, Counter(), 3)
    assert bench.get("count", 1).arguments == {"n": 2, "dtype": torch.float32}
    second = bench.get("count", 2)
    assert second.arguments["self"] == NotKept("tests.bench.test_recording.Counter", "Counter()")
    assert "  self = Counter()" in str(second)
    assert "  dtype = float32" in str(second)
    assert "return n + 1" in second.source


# Parts


def test_a_recorded_function_within_another_is_a_part_of_it(bench: Bench) -> None:
    inner = bench.record(name="inner")(lambda x: x + 1)
    outer = bench.record(name="outer")(lambda x: inner(inner(x)))
    assert outer(1) == 3
    assert bench.get("outer").parts == [entry.id for entry in bench.versions("inner")]
    assert bench.get("inner").parts == []


# Plain calls


def test_run_records_a_plain_call(bench: Bench) -> None:
    assert bench.run(helper, 2) == 6
    assert bench.get("helper").arguments == {"x": 2}
