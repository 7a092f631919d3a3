"""What is measured, on which model, how often, and what the project asks of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.grids import ANSWER, WRONG, Grid, Prompts, make_grid, make_prompts
from benchmarks.models import random_gpt2, random_llama
from benchmarks.peers.process import OWN, PEERS

OURS = "ours"
TRANSFORMERS, MINIMAL = "transformers", "minimal"
THREE, FOUR = "transformer_lens-3", "transformer_lens-4"
NNSIGHT = "nnsight"
LOOP = "ours, plain loop"
LIBRARIES = (OURS, TRANSFORMERS, *PEERS)
EVERYBODY = (*OWN, *PEERS)

# Ratios ours / other that are asked for, by measurement and by what it is compared with.
TARGETS: dict[tuple[str, str], float] = {
    ("load, unprocessed", TRANSFORMERS): 1.0,
    ("from nothing to a loaded model, unprocessed", TRANSFORMERS): 1.0,
    ("from nothing to a loaded model, processed", TRANSFORMERS): 1.2,
    ("load, unprocessed: peak memory", "the model's own bytes"): 1.15,
    ("load, processed: peak memory", "the model's own bytes"): 1.15,
    ("forward 1x128", TRANSFORMERS): 1.0,
    ("forward 8x128", TRANSFORMERS): 1.0,
    ("forward 1x1024", TRANSFORMERS): 1.0,
    ("forward 1x128, processed", TRANSFORMERS): 1.0,
    ("forward 8x128, processed", TRANSFORMERS): 1.0,
    ("forward 1x1024, processed", TRANSFORMERS): 1.0,
    ("residual cache 1x128", "ours, forward"): 1.03,
    ("full cache 1x128", THREE): 0.9,
    ("full cache 1x128", FOUR): 0.9,
    ("full cache 1x1024", THREE): 0.9,
    ("full cache 1x1024", FOUR): 0.9,
    ("lazy cache 1x1024: bytes held", "ours, full cache"): 1 / 30,
    ("attribution 1x128", TRANSFORMERS): 0.95,
    ("attribution 1x128", THREE): 1.0,
    ("attribution 1x128", FOUR): 1.0,
    ("attribution 1x128", NNSIGHT): 1.0,
    ("traced residual grid 12x32", "ours, sweep"): 1.05,
    ("generation of 50, batch 1", TRANSFORMERS): 0.9,
    ("generation of 50, batch 1", THREE): 0.4,
    ("generation of 50, batch 8", TRANSFORMERS): 0.9,
    ("generation of 50, batch 8", THREE): 0.4,
    ("tiny: forward 1x128", MINIMAL): 1.2,
    ("tiny: forward 8x128", MINIMAL): 1.2,
    ("tiny: forward 1x32", MINIMAL): 1.2,
    ("tiny: full cache 1x128", "ours, eager forward"): 1.3,
}

# The same for grids of patches: how many times faster than a plain loop of ours, and than everybody else's.
GRID_TARGETS = {"residual grid 12x32": (8, 10), "residual grid 12x128": (5.5, 6), "head grid 12x12": (4, 4)}
PROMPTS = ("every token differs", "one token differs")
TARGETS |= {
    (f"{grid}, {prompts}", other): 1 / (over_loop if other == LOOP else over_others)
    for grid, (over_loop, over_others) in GRID_TARGETS.items()
    for prompts in PROMPTS
    for other in (LOOP, TRANSFORMERS, *PEERS)
}

TARGETS |= {("residual grid 12x32, every token differs, metric a function", TRANSFORMERS): 1 / 8}

# What the README shows, and in which words.
MAIN = {
    "forward 1x128": "forward pass, 1 x 128 tokens",
    "forward 8x128": "forward pass, 8 x 128",
    "forward 1x1024": "forward pass, 1 x 1024",
    "full cache 1x128": "caching every activation, 1 x 128",
    "attribution 1x128": "gradients at every layer, 1 x 128",
    "generation of 50, batch 1": "50 tokens generated",
    "residual grid 12x32, every token differs": "patching grid, 12 layers by 32 positions",
    "residual grid 12x128, every token differs": "patching grid, 12 layers by 128 positions",
    "head grid 12x12, every token differs": "patching grid, 12 layers by 12 heads",
    "from nothing to a loaded model, unprocessed": "start Python, import, load",
    "from nothing to a loaded model, processed": "the same, folded and centred",
    "tiny: forward 1x128": "forward pass, two layers of width 64",
}

# A grid of more cells is swept once.
MANY_CELLS = 1000


@dataclass(frozen=True)
class Task:
    """Something that contestants are asked to do a number of times.

    Attributes:
        name: of the measurement.
        group: the part of the page that it belongs to.
        model: that has to be loaded, if any.
        way: in which it is loaded, `"unprocessed"` or `"processed"`; contestants that have one way load in that.
        task: what is asked of everybody.
        arguments: of the request.
        rounds: how often everybody's turn comes.
        number: how often it is done in one turn.
        who: may take part.
        beside: other things that we do in turn with it, by the name under which they are compared.
        held: whether the bytes that come out are a measurement too.
        tolerance: the largest difference at which values are the same.
    """

    name: str
    group: str
    model: str | None
    task: str
    arguments: dict[str, Any]
    rounds: int
    number: int = 1
    who: tuple[str, ...] = LIBRARIES
    beside: dict[str, str] = field(default_factory=dict)
    held: bool = False
    tolerance: float = 1e-4
    way: str = "unprocessed"


@dataclass(frozen=True)
class Fresh:
    """What a fresh interpreter takes.

    Attributes:
        what: `"import"` of what loads a model, once torch is there; or `"start"`, from nothing to a loaded model.
        model, way: which is loaded, and how.
    """

    name: str
    group: str
    what: str
    rounds: int
    model: str = "tiny"
    way: str = "unprocessed"


@dataclass(frozen=True)
class Peak:
    """The peak of memory while a model is loaded, in a fresh process."""

    name: str
    group: str
    way: str
    rounds: int = 1


@dataclass(frozen=True)
class Patching:
    """A grid of patches: ours by the sweep, everybody else's by some of its cells.

    Attributes:
        function: our metric is a function of one's own.
    """

    name: str
    group: str
    model: str
    grid: Grid
    prompts: Prompts
    rounds: int
    cells: int
    function: bool = False


Measurement = Task | Fresh | Peak | Patching


@dataclass(frozen=True)
class Scale:
    """Sizes of models and inputs, and how often things are done.

    Attributes:
        small, tiny, llama: fields of the models' configs.
        shapes: of the forward passes [batch, pos], from the quickest to the slowest.
        tiny_shapes: of those of the tiny model.
        prompt, new: tokens that a generation begins with and adds.
        batches: of generations.
        grids: positions of patching grids, the long one last.
        cells: of a grid that loops do in a round.
        rounds: of what takes least; of the rest, in proportion.
        number: how often the tiny model runs in a turn.
    """

    small: dict[str, Any]
    tiny: dict[str, Any]
    llama: dict[str, Any]
    shapes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    tiny_shapes: tuple[tuple[int, int], ...]
    prompt: int
    new: int
    batches: tuple[int, ...]
    grids: tuple[int, ...]
    cells: int
    rounds: int
    number: int

    def models(self) -> dict[str, Callable[[], Any]]:
        """Return, by name, functions that make the models."""
        return {
            "small": lambda: random_gpt2(**self.small),
            "llama": lambda: random_llama(**self.llama),
            "tiny": lambda: random_gpt2(**self.tiny),
        }

    def some(self, share: float) -> int:
        """Return a share of the rounds."""
        return max(1, round(share * self.rounds))


TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 256, "vocab_size": 1000}
FULL = Scale(
    small={},
    tiny=TINY,
    llama={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 32000,
        "max_position_embeddings": 1024,
    },
    shapes=((1, 128), (8, 128), (1, 1024)),
    tiny_shapes=((1, 128), (8, 128), (1, 32)),
    prompt=32,
    new=50,
    batches=(1, 8),
    grids=(32, 128),
    cells=12,
    rounds=9,
    number=50,
)
QUICK = Scale(
    small={"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 100},
    tiny={**TINY, "n_embd": 32},
    llama={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    },
    shapes=((1, 16), (2, 16), (1, 32)),
    tiny_shapes=((1, 16),),
    prompt=8,
    new=5,
    batches=(2,),
    grids=(4,),
    cells=4,
    rounds=1,
    number=2,
)


def plan(scale: Scale, device: str = "cpu") -> list[Measurement]:
    """Return all measurements, in the order in which they are made; on an accelerator none of loading."""
    if device != "cpu":
        return [*_small(scale), *_patching(scale), *_llama(scale), *_tiny(scale)]
    return [
        Fresh("import", "Import and load", "import", scale.some(1 / 3)),
        Fresh("from nothing to a tiny model", "Import and load", "start", scale.some(1 / 3)),
        *(
            Fresh(f"from nothing to a loaded model, {way}", "Import and load", "start", scale.some(1 / 3), "small", way)
            for way in ("unprocessed", "processed")
        ),
        *_loading(scale),
        *_small(scale),
        *_patching(scale),
        *_llama(scale),
        *_tiny(scale),
    ]


def _loading(scale: Scale) -> list[Measurement]:
    return [
        one
        for way in ("unprocessed", "processed")
        for one in (
            _load(scale, f"load, {way}", way, read=False),
            _load(scale, f"load, {way}, and read", way, read=True),
            Peak(f"load, {way}: peak memory", "Import and load", way),
        )
    ]


def _load(scale: Scale, name: str, way: str, read: bool) -> Task:
    arguments = {"folder": "small", "way": way, "read": read}
    # Folding and centring round anew: their log probabilities differ by some more than those of the same weights.
    return Task(name, "Import and load", None, "load", arguments, scale.some(1 / 3), tolerance=1e-3)


def _small(scale: Scale) -> list[Measurement]:
    vocab, n_layers = scale.small.get("vocab_size", 50257), scale.small.get("n_layer", 12)
    short, wide, long = (random_tokens(vocab, *shape) for shape in scale.shapes)
    one, many, far = (f"{batch}x{pos}" for batch, pos in scale.shapes)
    layer = {"layer": (n_layers - 1) // 2}
    full, own_forward = {"tokens": short, **layer}, {"ours, forward": "forward"}
    tasks = [
        Task(f"forward {one}", "Forward", "small", "forward", {"tokens": short}, scale.rounds, who=EVERYBODY),
        Task(f"forward {many}", "Forward", "small", "forward", {"tokens": wide}, scale.some(0.6), who=EVERYBODY),
        Task(f"forward {far}", "Forward", "small", "forward", {"tokens": long}, scale.some(0.6), who=EVERYBODY),
        *(
            Task(
                f"forward {shape}, processed",
                "Forward",
                "small",
                "forward_log_probs",
                {"tokens": tokens},
                rounds,
                tolerance=1e-3,  # folded weights round anew
                way="processed",
            )
            for shape, tokens, rounds in (
                (one, short, scale.rounds),
                (many, wide, scale.some(0.4)),
                (far, long, scale.some(0.4)),
            )
        ),
        Task(
            f"residual cache {one}",
            "Caches",
            "small",
            "residual_cache",
            {"tokens": short},
            2 * scale.rounds,
            beside=own_forward,
        ),
        Task(f"full cache {one}", "Caches", "small", "full_cache", full, scale.some(0.6), beside=own_forward),
        Task(
            f"full cache {far}",
            "Caches",
            "small",
            "full_cache",
            {"tokens": long, **layer},
            scale.some(1 / 3),
            held=True,
        ),
        Task(
            f"lazy cache {far}",
            "Caches",
            "small",
            "lazy_cache",
            {"tokens": long, **layer},
            scale.some(1 / 3),
            who=(OURS,),
            beside={"ours, full cache": "full_cache", **own_forward},
            held=True,
        ),
        Task(f"hooked forward {one}, stream", "Hooks and gradients", "small", "hooked_stream", full, scale.some(0.6)),
        Task(f"hooked forward {one}, head", "Hooks and gradients", "small", "hooked_head", full, scale.some(0.6)),
        Task(
            f"attribution {one}",
            "Hooks and gradients",
            "small",
            "attribution",
            {"tokens": short, "answer": ANSWER, "wrong": WRONG},
            scale.some(0.6),
        ),
    ]
    return [*tasks, *_generations(scale, "", "small", vocab, scale.batches), *_traces(scale, vocab, n_layers, short)]


def _traces(scale: Scale, vocab: int, n_layers: int, short: list[list[int]]) -> list[Task]:
    n_pos = scale.grids[0]
    prompts, _ = make_prompts(n_pos, vocab)
    grid = {"clean": prompts.clean.tolist(), "corrupted": prompts.corrupted.tolist(), "answer": ANSWER, "wrong": WRONG}
    own = {"who": (OURS,), "group": "Traces", "model": "small"}
    return [
        Task(
            name=f"traced forward 1x{len(short[0])}",
            task="traced_forward",
            arguments={"tokens": short},
            rounds=scale.rounds,
            beside={"ours, forward": "forward"},
            **own,
        ),
        Task(
            name=f"traced residual grid {n_layers}x{n_pos}",
            task="traced_grid",
            arguments=grid,
            rounds=scale.some(0.6),
            beside={"ours, sweep": "swept_grid"},
            **own,
        ),
    ]


def _generations(scale: Scale, prefix: str, model: str, vocab: int, batches: tuple[int, ...]) -> list[Task]:
    return [
        Task(
            f"{prefix}generation of {scale.new}, batch {batch}",
            "Generation" if model == "small" else "Llama-like, 160M",
            model,
            "generate",
            {"tokens": random_tokens(vocab, batch, scale.prompt), "new": scale.new},
            scale.some(1 / 3),
        )
        for batch in batches
    ]


def _patching(scale: Scale) -> list[Measurement]:
    fields = {"n_layer": 12, "n_head": 12, "vocab_size": 50257} | scale.small
    n_layers, n_heads, short = fields["n_layer"], fields["n_head"], scale.grids[0]
    every, one = make_prompts(short, fields["vocab_size"])
    pairs = [
        (prompts, grid)
        for grid in (
            make_grid("residual grid", "resid_pre", (n_layers, short)),
            make_grid("head grid", "attn_head_out_all_pos", (n_layers, n_heads)),
        )
        for prompts in (every, one)
    ]
    pairs.append((every, make_grid("head-by-position grid", "attn_head_out_by_pos", (n_layers, short, n_heads))))
    for n_pos in scale.grids[1:]:
        grid = make_grid("residual grid", "resid_pre", (n_layers, n_pos))
        pairs += [(prompts, grid) for prompts in make_prompts(n_pos, fields["vocab_size"])]
    patchings = [
        Patching(
            f"{grid.name}, {prompts.name}",
            "Patching grids",
            "small",
            grid,
            prompts,
            # A long sweep is long enough to be done once.
            1 if len(grid.cells) > MANY_CELLS else scale.some(0.2),
            scale.cells,
        )
        for prompts, grid in pairs
    ]
    first = patchings[0]
    patchings.insert(1, replace(first, name=f"{first.name}, metric a function", function=True))
    return patchings


def _llama(scale: Scale) -> list[Measurement]:
    group, vocab = "Llama-like, 160M", scale.llama["vocab_size"]
    layer = (scale.llama["num_hidden_layers"] - 1) // 2
    inputs = [(f"{batch}x{pos}", random_tokens(vocab, batch, pos)) for batch, pos in scale.shapes]
    one, short = inputs[0]
    return [
        *(
            Task(f"llama: forward {shape}", group, "llama", "forward", {"tokens": tokens}, scale.some(0.4))
            for shape, tokens in inputs
        ),
        Task(
            f"llama: full cache {one}",
            group,
            "llama",
            "full_cache",
            {"tokens": short, "layer": layer},
            scale.some(0.4),
            held=True,
        ),
        *_generations(scale, "llama: ", "llama", vocab, scale.batches),
    ]


def _tiny(scale: Scale) -> list[Measurement]:
    group, vocab = "Overhead, on a tiny model", scale.tiny["vocab_size"]
    inputs = [(f"{batch}x{pos}", random_tokens(vocab, batch, pos)) for batch, pos in scale.tiny_shapes]
    one, short = inputs[0]
    turns: dict[str, Any] = {"rounds": 2 * scale.rounds, "number": scale.number}
    return [
        *(
            Task(f"tiny: forward {shape}", group, "tiny", "forward", {"tokens": tokens}, who=EVERYBODY, **turns)
            for shape, tokens in inputs
        ),
        Task(
            f"tiny: full cache {one}",
            group,
            "tiny",
            "full_cache",
            {"tokens": short, "layer": 0},
            beside={"ours, eager forward": "eager_forward"},
            **turns,
        ),
    ]


def random_tokens(vocab: int, batch: int, pos: int) -> list[list[int]]:
    """Return tokens [batch pos], the same ones each time."""
    generator = torch.Generator().manual_seed(1000 * batch + pos)
    return torch.randint(0, vocab, (batch, pos), generator=generator).tolist()
