"""A model that is shared out among processes computes what one process computes, to 1e-10 in float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from hooked_lm import HookedTransformer, Intervention, metrics, parallel
from hooked_lm.parallel.plan import check_sizes
from hooked_lm.sweep import sweep
from tests.family_rows import ROWS
from tests.helpers import tiny_config, tiny_model, tiny_tokens
from tests.parallel.ranks import differences, in_ranks

pytestmark = pytest.mark.usefixtures("no_type_checks")
WHOLE = "HOOKED_LM_RANKS" in os.environ
FOUR: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "d_head": 4}
ROTARY: dict[str, Any] = {**FOUR, "positional_embedding_type": "rotary", "gated_mlp": True, "normalization_type": "RMS"}
CASES: dict[str, dict[str, Any]] = {
    "plain": FOUR,
    "two heads share keys": {**ROTARY, "n_key_value_heads": 2},
    "all heads share keys": {**ROTARY, "n_key_value_heads": 1},
    "ungrouped": {**ROTARY, "n_key_value_heads": 2, "ungroup_grouped_query_attention": True},
    "alibi, windows": {
        **FOUR,
        "positional_embedding_type": "alibi",
        "attn_types": ["local", "global"],
        "window_size": 3,
    },
    "parallel": {**FOUR, "parallel_attn_mlp": True},
    "experts": {**FOUR, "num_experts": 3, "experts_per_token": 2, "gated_mlp": True, "d_shared_expert": 8},
    "norms of heads": {**ROTARY, "n_key_value_heads": 2, "use_qk_norm": True},
    "norms across heads": {**ROTARY, "n_key_value_heads": 2, "use_qk_norm": True, "qk_norm_across_heads": True},
    "sinks and gates": {**FOUR, "attention_sinks": True, "attention_gate": True},
    "attention only": {**FOUR, "attn_only": True, "attn_scores_soft_cap": 0.7},
    "norms on the stream": {**FOUR, "norm_placement": "residual", "positional_embedding_type": "shortformer"},
}
# With four ranks key-value heads have copies.
ON_FOUR = ("two heads share keys", "all heads share keys", "ungrouped", "norms of heads", "norms across heads")


def compare(folder: Path, names: list[str]) -> dict[str, list[str]]:
    return {name: differences(tiny_model(**CASES[name]), tiny_tokens(2, 6)) for name in names}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found. They start once, which takes longer than what they do."""
    return in_ranks(2, tmp_path_factory.mktemp("ranks"), all_of_two)


def all_of_two(folder: Path) -> dict[str, Any]:
    return {
        "architectures": compare(folder, list(CASES)),
        "use": use(folder),
        "fsdp": fully_sharded(folder),
        "count": count(folder),  # the last, since it counts from then on
    }


def test_every_architecture(of_two: list[dict[str, Any]]) -> None:
    for found in of_two:
        assert found["architectures"] == {name: [] for name in CASES}


def test_key_value_heads_that_are_fewer_than_the_ranks(tmp_path: Path) -> None:
    names = list(ON_FOUR) if WHOLE else ["norms of heads"]
    for found in in_ranks(4, tmp_path, compare, names):
        assert found == {name: [] for name in names}


# Three heads are not shared out among two or four.
MORE_HEADS: dict[str, dict[str, Any]] = {
    "modernbert-decoder": {"num_attention_heads": 4},
    "longcat-flash": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


def compare_saved(folder: Path, names: list[str]) -> dict[str, list[str]]:
    found = {}
    for name in names:
        model = HookedTransformer.from_pretrained_no_processing(folder / name, tokenizer=False, dtype=torch.float64)
        tokens = torch.load(folder / name / "tokens.pt")
        found[name] = differences(model, tokens)
        part = parallel.load(
            folder / name,
            tokenizer=False,
            dtype=torch.float64,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
        if not torch.allclose(part(tokens), model(tokens), rtol=1e-10, atol=1e-10):
            found[name].append("loaded part by part")
    return found


@pytest.mark.skipif(
    "HOOKED_LM_RANKS" not in os.environ, reason="HOOKED_LM_RANKS is not set: every family takes minutes"
)
@pytest.mark.parametrize("size", [2, 4])
def test_every_family(tmp_path: Path, size: int) -> None:
    names = []
    for row in {row.architecture: row for row in reversed(ROWS)}.values():
        changes, checkpoint = MORE_HEADS.get(row.id, {}), tmp_path / "checkpoint" / row.id
        checkpoint.mkdir(parents=True)
        row.save(row.build(**changes), checkpoint)
        model = HookedTransformer.from_pretrained_no_processing(checkpoint, tokenizer=False).to(torch.float64)
        model.save_pretrained(tmp_path / row.id)
        torch.save(row.tokens(2), tmp_path / row.id / "tokens.pt")
        names.append(row.id)
    assert len(names) > 80
    for found in in_ranks(size, tmp_path, compare_saved, names):
        assert {name: faults for name, faults in found.items() if faults} == {}


# What it costs


def count(folder: Path) -> dict[str, dict[str, int]]:
    counted: Counter[str] = Counter()
    for name in ("all_reduce", "all_gather", "broadcast"):
        original = getattr(dist, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counted[_name] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, counting)
    model, tokens = parallel.shard(tiny_model(**{**FOUR, "n_layers": 3})), tiny_tokens(2, 6)

    def of(work: Any) -> dict[str, int]:
        counted.clear()
        work()
        return dict(counted)

    with torch.no_grad():
        bare = of(lambda: model(tokens))
        heads = of(lambda: model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z"))
        stream = of(lambda: model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post"))
        weights = of(lambda: model.W_O)
    return {"bare": bare, "heads": heads, "stream": stream, "weights": weights}


def test_two_sums_for_each_block_and_gathers_only_where_something_listens(of_two: list[dict[str, Any]]) -> None:
    for found in (one["count"] for one in of_two):
        assert found["bare"] == found["stream"] == {"all_reduce": 6}
        assert found["heads"] == {"all_reduce": 6, "all_gather": 1}
        assert found["weights"] == {"all_gather": 3}


def use(folder: Path) -> dict[str, Any]:
    """What a user does with a model that is shared out; what differs from the whole one."""
    whole = tiny_model(**FOUR)
    model, tokens = parallel.shard(whole), tiny_tokens(2, 6)
    assert model.ranks is not None
    found: dict[str, Any] = {"sizes": [list(model.blocks[0].attn.W_Q.shape), list(model.W_Q.shape), model.cfg.n_heads]}
    found["weights"] = [
        name
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_V", "W_in", "W_out", "b_in", "b_out", "b_O")
        if not torch.equal(getattr(model, name), getattr(whole, name))
    ]
    # A field that may be assigned acts in every block.
    whole.cfg.attn_scores_soft_cap = model.cfg.attn_scores_soft_cap = 0.3
    found["assigned"] = float((model(tokens) - whole(tokens)).abs().max())
    whole.cfg.attn_scores_soft_cap = model.cfg.attn_scores_soft_cap = -1.0
    # Ranks whose generators differ still write one text.
    torch.manual_seed(model.ranks.rank)
    found["text"] = model.generate(tokens[:, :3], max_new_tokens=6, stop_at_eos=False, verbose=False).tolist()
    cells = [[(one)] for one in edits()]
    scores = sweep(model, tokens, cells, metrics.logit([1, 2]), verbose=False)
    expected = sweep(whole, tokens, cells, metrics.logit([1, 2]), incremental=False, verbose=False)
    found["sweep"] = float((scores - expected).abs().max())
    lazy = model.run_with_cache(tokens, lazy=True)[1]
    full = whole.run_with_cache(tokens)[1]
    found["lazy"] = max(float((lazy[name] - full[name]).abs().max()) for name in full)
    errors = {
        "save": lambda: model.save_pretrained(folder / "saved"),
        "process": model.process_weights_,
        "spread": lambda: model.spread(["cpu"]),
        "heads' results": lambda: model.run_with_cache(tokens)[1].stack_head_results(),
        "head inputs": lambda: model.run_with_hooks(
            tokens, return_type="loss", fwd_hooks=[("blocks.0.hook_q_input", lambda x, hook: x * 2)]
        ),
    }
    for name, work in errors.items():
        try:
            work()
            found[name] = "no error"
        except (ValueError, NotImplementedError) as error:
            found[name] = str(error)
    return found


def edits() -> list[Any]:
    sites = ("attn.hook_z", "mlp.hook_post", "hook_resid_pre", "attn.hook_pattern")
    return [Intervention(f"blocks.1.{site}", "scale", 0.5, pos=-1) for site in sites]


def test_what_a_user_does_with_it(of_two: list[dict[str, Any]]) -> None:
    first, second = (one["use"] for one in of_two)
    assert first["sizes"] == [[2, 12, 4], [2, 4, 12, 4], 4]
    assert first["text"] == second["text"]
    for found in (first, second):
        assert found["weights"] == []
        assert found["assigned"] < 1e-12
        assert found["sweep"] < 1e-10
        assert found["lazy"] < 1e-10
        assert "a part of the model's weights" in found["save"]
        assert "a part of the model's weights" in found["process"]
        assert "is not spread over devices too" in found["spread"]
        assert "this process has a part of those" in found["heads' results"]
        assert "hook_q_input" in found["head inputs"]


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"n_heads": 3}, 2, "3 heads are not shared out evenly among 2"),
        ({"n_heads": 6, "n_key_value_heads": 3}, 2, "3 key-value heads and 2 processes"),
        ({"n_heads": 4, "d_mlp": 10}, 4, "d_mlp=10 neurons"),
        ({"n_heads": 4, "act_fn": "solu_ln"}, 2, "normalises all neurons together"),
    ],
)
def test_what_cannot_be_shared_out(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sizes(tiny_config(**{"d_head": 4, **changes}), size)


def test_without_a_group_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed\.run --nproc-per-node"):
        parallel.shard(tiny_model(**FOUR))


# Lost and silent ranks

FAULTY = """
import datetime, os, signal, sys, time, torch
import torch.distributed as dist
from hooked_lm import parallel
from tests.helpers import tiny_model, tiny_tokens
rank, fault = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=3))
model = parallel.shard(tiny_model(n_layers=2, n_heads=4, d_head=4))
model(tiny_tokens(2, 6))
if rank == 1:
    if fault == "lost":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
begun = time.time()
try:
    model(tiny_tokens(2, 6))
    print("no error")
except RuntimeError as error:
    print(f"{time.time() - begun:.1f} {error}")
"""


def test_a_rank_that_is_lost_or_silent_is_an_error_in_time(tmp_path: Path) -> None:
    started: dict[str, list[subprocess.Popen[str]]] = {
        fault: [
            subprocess.Popen(
                [sys.executable, "-c", FAULTY, str(rank), str(tmp_path / fault), fault],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        for fault in ("lost", "silent")
    }
    for fault, (least, most) in {"lost": (0.0, 3.0), "silent": (2.5, 12.0)}.items():
        first, second = started[fault]
        found, _ = first.communicate(timeout=60)
        second.kill()
        second.communicate()
        seconds, _, message = found.partition(" ")
        assert least <= float(seconds) <= most, (fault, found)
        assert message


# FSDP2


def fully_sharded(folder: Path) -> dict[str, float]:
    whole, model, tokens = tiny_model(**FOUR), tiny_model(**FOUR), tiny_tokens(2, 6)
    parallel.make_contiguous(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    loss, expected = model(tokens, return_type="loss"), whole(tokens, return_type="loss")
    loss.backward()
    expected.backward()
    off = {"loss": float((loss - expected).detach().abs())}
    for name, parameter in model.named_parameters():
        other = dict(whole.named_parameters())[name]
        assert parameter.grad is not None
        assert other.grad is not None
        off[name] = float((parameter.grad.full_tensor() - other.grad).abs().max())  # type: ignore[operator]
    kept: list[Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: kept.append(x.clone()))])
        whole.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: kept.append(x.clone()))])
    off["z"] = float((kept[0] - kept[1]).abs().max())
    return off


def test_fully_sharded_data_parallel_takes_the_model(of_two: list[dict[str, Any]]) -> None:
    for found in of_two:
        assert {name: off for name, off in found["fsdp"].items() if off > 1e-10} == {}
