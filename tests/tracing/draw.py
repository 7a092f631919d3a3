"""Random traces, drawn from a seed: runs of prompts of several lengths, reads, operations, edits and gradients."""

from __future__ import annotations

import random
from typing import Any

import torch

from hooked_lm import HookedTransformer
from hooked_lm.metrics import log_prob, logit_diff
from hooked_lm.tracing import Run, Trace, TraceError, Value
from tests.helpers import tiny_model

CONFIGS: list[dict[str, Any]] = [
    {"n_layers": 3},
    {"positional_embedding_type": "rotary", "rotary_dim": 4, "n_key_value_heads": 1, "gated_mlp": True, "d_head": 4},
    {"parallel_attn_mlp": True, "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 4},
    {"attn_only": True, "positional_embedding_type": "shortformer"},
    {"positional_embedding_type": "alibi", "normalization_type": None},
    {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True},
]
# The kinds of lines, each as often as it is drawn.
MOVES = ("read", "read", "write", "write")
COMPUTATIONS = ("compute", "compute", "combine", "score", "lens", "gradient", "constant")
_models: dict[int, HookedTransformer] = {}


def model_of(which: int) -> HookedTransformer:
    """One of six tiny models."""
    if which not in _models:
        _models[which] = tiny_model(**CONFIGS[which])
    return _models[which]


def record(trace: Trace, seed: int, moves_only: bool = False) -> bool:
    """Record a random experiment; return whether it has anything to run.

    Args:
        trace: takes it.
        seed: of the draws.
        moves_only: runs of one prompt, whose activations go from place to place and are not computed with.
    """
    drawing = _Drawing(trace, random.Random(seed), moves_only)
    drawing.begin()
    for _ in range(drawing.random.randint(3, 12)):
        try:
            drawing.step()
        except TraceError as error:
            # What does not fit is refused when it is recorded; everything else is a fault of the package.
            if "circle" in str(error):
                raise
    return drawing.finish()


class _Drawing:
    def __init__(self, trace: Trace, generator: random.Random, moves_only: bool) -> None:
        self.trace, self.random, self.moves_only = trace, generator, moves_only
        self.runs: list[Run] = []
        self.pool: list[Value] = []
        self.sites = [name for name in trace.target.axes if not name.endswith(("hook_tokens", "expert_indices"))]
        self.kinds = MOVES if moves_only else (*MOVES, *COMPUTATIONS)
        if moves_only:
            self.sites = [name for name in self.sites if not name.startswith("unembed.")]

    def begin(self) -> None:
        vocab = self.trace.target.cfg.d_vocab
        for _ in range(self.random.randint(1, 3)):
            equal = self.random.random() < 0.5
            length = self.random.randint(3, 6)
            lengths = [
                length if equal else self.random.randint(3, 6)
                for _ in range(self.random.randint(1, 1 if self.moves_only else 3))
            ]
            self.runs.append(
                self.trace.prompts([[self.random.randrange(vocab) for _ in range(one)] for one in lengths])
            )

    def part(self) -> Any:
        run = self.random.choice(self.runs)
        name = self.random.choice(self.sites)
        axes = self.trace.target.axes[name]
        chosen: dict[str, Any] = {}
        if "pos" in axes or "query" in axes:
            chosen["pos"] = self.random.choice([-1, 0, 1, -2, [0, -1], slice(-2, None), slice(0, 2), None])
        if ("head" in axes or "kv_head" in axes) and self.random.random() < 0.4:
            chosen["head"] = self.random.choice([0, [0], -1])
        if axes[-1] == "key":
            chosen["feature"] = self.random.choice([0, -1, [0, 1], None])
        elif axes[-1] in ("d_model", "d_mlp", "d_head") and self.random.random() < 0.3:
            chosen["feature"] = self.random.choice([0, [0, 2], slice(1, 4)])
        if self.random.random() < 0.3:
            chosen["batch"] = self.random.choice([0, -1, [0]])
        return run[name].at(**{name: one for name, one in chosen.items() if one is not None})

    def step(self) -> None:
        getattr(self, self.random.choice(self.kinds))()

    def read(self) -> None:
        part = self.part()
        part.type  # noqa: B018 - refused here if the prompts' positions differ in number
        if self.random.random() < 0.5:
            part.node  # noqa: B018 - recorded now, or when it is used; it is the value as of now either way
        self.pool.append(part)

    def constant(self) -> None:
        width = self.trace.target.cfg.d_model
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(self.random.randrange(1000)))
        self.pool.append(self.trace.constant(drawn.double()))

    def any(self) -> Value:
        if not self.pool:
            self.read()
        return self.random.choice(self.pool)

    def compute(self) -> None:
        x = self.any()
        axis = self.random.randrange(x.ndim) if x.ndim else None
        names = ["exp", "tanh", "relu", "sigmoid", "abs", "neg", "clamp", "gelu"]
        if axis is not None:
            names += ["sum", "mean", "norm", "softmax", "cumsum", "amax", "select", "move", "topk_values", "var"] * 2
        name = self.random.choice(names)
        params: dict[str, Any] = {
            "clamp": {"least": -0.5, "most": 1.5},
            "sum": {"axis": axis, "keep": False},
            "mean": {"axis": axis, "keep": False},
            "norm": {"axis": axis, "keep": True},
            "amax": {"axis": axis, "keep": False},
            "var": {"axis": None, "keep": False},
            "softmax": {"axis": axis},
            "cumsum": {"axis": axis},
            "select": {"axis": axis, "entries": 0},
            "move": {"order": list(range(x.ndim))[::-1]},
            "topk_values": {"k": 1, "axis": axis},
        }.get(name, {})
        self.pool.append(self.trace.op(name, x, **params))

    def combine(self) -> None:
        one, other = self.any(), self.random.choice([self.any(), 0.5, 2])
        self.pool.append(self.trace.op(self.random.choice(["add", "sub", "mul", "maximum"]), one, other))

    def write(self) -> None:
        part = self.part()
        if self.moves_only and self.trace.target.axes[part.name] != ("batch", "pos", "d_model"):
            return  # an edited tensor may lie in memory otherwise here and there, and attention then rounds otherwise
        how = self.random.choice(["replace", "add", "scale", "zero"])
        if how == "zero":
            part.zero()
            return
        fitting = [one for one in self.pool if _fits(one, part)]
        if self.moves_only:
            part.write(how, self.random.choice(fitting[-3:] or [self.any()]))
            return
        part.write(how, self.random.choice([*fitting[-3:], self.any().tanh().mean(), 0.3]))

    def score(self) -> None:
        metric = self.random.choice([log_prob(3), logit_diff(1, 2, pos=self.random.choice([-1, 0]))])
        self.pool.append(self.random.choice(self.runs).metric(metric))

    def lens(self) -> None:
        run = self.random.choice(self.runs)
        layer = self.random.randrange(self.trace.target.cfg.n_layers)
        self.pool.append(self.trace.logits_of(run["resid_post", layer].at(pos=-1)).log_softmax(-1)[..., 0])

    def gradient(self) -> None:
        of = self.part()
        made = self.trace.gradient(self.any().tanh().sum(), of=of)
        assert isinstance(made, Value)
        self.pool.append(made)

    def finish(self) -> bool:
        for one in self.random.sample(self.pool, min(len(self.pool), 4)):
            one.save()
        return bool(self.pool)


def _fits(value: Value, part: Value) -> bool:
    try:
        shape = torch.broadcast_shapes(value.shape, part.shape)
    except (RuntimeError, TraceError):
        return False
    return tuple(shape) == part.shape
