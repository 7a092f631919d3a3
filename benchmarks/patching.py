"""Activation patching by the sweep, beside the plain hooked loop and beside other libraries, as ratios.

python -m benchmarks.patching [--peer transformer_lens-3=PYTHON] [--peer transformer_lens-4=PYTHON] [--long]

The model is GPT-2 small's size with random weights, the same everywhere. PYTHON is the interpreter of an environment
that the peer is installed in; a peer that is not named is skipped. The sweep does whole grids; the others do some of a
grid's cells, evenly spread, half before the sweep and half after it, since every cell of a loop takes as long as any
other. Recording the clean run, in full, is left out of everybody's time. Values are compared on those cells.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.forward import machine
from benchmarks.models import random_gpt2, write_model
from benchmarks.peers.ours import patch_in_turn
from benchmarks.peers.process import PEERS, Asked, Peer, interpreter_of, start_peer
from benchmarks.timing import Timing
from hooked_lm import HookedTransformer, patching
from hooked_lm.metrics import logit_diff
from hooked_lm.patching import PATCHES
from hooked_lm.patching.activation import grid_shape

ANSWER, WRONG = 3, 4
METRIC = logit_diff(ANSWER, WRONG)
# The largest difference at which two values still count as the same.
TOLERANCE = 1e-4
LOOP = "plain loop"
# What the project asks of itself: how many times faster than the loop, and than each peer.
TARGETS = {"residual grid 12x32": (8.0, 10.0), "residual grid 12x128": (12.0, 12.0), "head grid 12x12": (4.0, 4.0)}
# Grids with more cells than this are swept once: that is long enough.
MANY_CELLS = 1000

Index = Sequence[int]
# Cells of a grid -> the seconds that they took, and their values.
Measurement = tuple[float, list[float]]
Contestant = Callable[[Sequence[Index]], Measurement]


@dataclass(frozen=True)
class Prompts:
    """A clean and a corrupted prompt.

    Attributes:
        name: how they differ.
        clean: [batch pos].
        corrupted: [batch pos].
    """

    name: str
    clean: Tensor
    corrupted: Tensor


@dataclass(frozen=True)
class Grid:
    """What is patched, cell by cell.

    Attributes:
        name: with its size.
        patch: which of `PATCHES`.
        cells: the index of every cell, in the order of the results.
    """

    name: str
    patch: str
    cells: list[Index]


@dataclass(frozen=True)
class Round:
    """A grid done once.

    Attributes:
        seconds: of the sweep.
        values: of every cell.
        others: by name, somebody's seconds for the whole grid, and the largest difference of his values.
    """

    seconds: float
    values: Tensor
    others: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Somebody's time and values beside the sweep's.

    Attributes:
        seconds: for the whole grid, from those of some cells; the median over the rounds.
        ratio: how many times faster the sweep is; the median over the rounds.
        ratio_range: the smallest and the largest of the rounds.
        largest_difference: of the values.
        target: the ratio that is asked for, if any.
    """

    seconds: float
    ratio: float
    ratio_range: tuple[float, float]
    largest_difference: float
    target: float | None


@dataclass(frozen=True)
class Result:
    """One grid on one pair of prompts.

    Attributes:
        grid: its name.
        prompts: how they differ.
        cells: how many there are.
        compared: how many of them the others did, over all rounds.
        rounds: how often all of it was done.
        seconds: of the sweep; the median over the rounds.
        deviation: the standard deviation of the values, which their differences are to be seen beside.
        beside: by name, the loop and the peers.
    """

    grid: str
    prompts: str
    cells: int
    compared: int
    rounds: int
    seconds: float
    deviation: float
    beside: dict[str, Comparison]


# Prompts


def make_prompts(n_pos: int, d_vocab: int) -> tuple[Prompts, Prompts]:
    """Return a pair without a token in common, and a pair that differs in the middle only."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, d_vocab, (1, n_pos), generator=generator)
    shift = torch.randint(1, d_vocab, (1, n_pos), generator=generator)
    other = (clean + shift) % d_vocab
    middle = torch.arange(n_pos) == n_pos // 2
    return Prompts("every token differs", clean, other), Prompts(
        "one token differs", clean, clean.where(~middle, other)
    )


def make_grid(model: HookedTransformer, kind: str, patch: str, n_pos: int) -> Grid:
    """Return all cells of a grid."""
    axes = PATCHES[patch].axes
    shape = grid_shape(model, PATCHES[patch].activation, axes, n_pos)
    return Grid(f"{kind} {'x'.join(map(str, shape))}", patch, list(itertools.product(*map(range, shape))))


def plan(model: HookedTransformer, long: bool) -> Iterator[tuple[Prompts, list[Grid]]]:
    """Yield pairs of prompts with the grids that are measured on them."""
    residual = partial(make_grid, model, "residual grid", "resid_pre")
    heads = make_grid(model, "head grid", "attn_head_out_all_pos", 32)
    everywhere = make_grid(model, "head-by-position grid", "attn_head_out_by_pos", 32)
    every, one = make_prompts(32, model.cfg.d_vocab)
    yield every, [residual(32), heads, everywhere]
    yield one, [residual(32), heads]
    if long:
        for prompts in make_prompts(128, model.cfg.d_vocab):
            yield prompts, [residual(128)]


# Contestants


def run_loop(
    model: HookedTransformer, prompts: Prompts, cache: Mapping[Any, Tensor], grid: Grid, cells: Sequence[Index]
) -> Measurement:
    """Patch cell by cell, as one does without a sweep."""
    patch = PATCHES[grid.patch]
    start = time.perf_counter()
    values = patch_in_turn(model, prompts.corrupted, cache, patch.activation, patch.setter, METRIC, cells)
    return time.perf_counter() - start, values


def ask_peer(peer: Asked, grid: Grid, cells: Sequence[Index]) -> Measurement:
    """Let a peer patch cell by cell."""
    patch = PATCHES[grid.patch]
    reply = peer.ask(
        "patch",
        activation=patch.activation,
        setter=patch.setter.name,
        axes=patch.axes,
        cells=cells,
        answer=ANSWER,
        wrong=WRONG,
    )
    return reply["seconds"], reply["values"]


def run_sweep(
    model: HookedTransformer, prompts: Prompts, cache: Mapping[Any, Tensor], grid: Grid
) -> tuple[float, Tensor]:
    """Patch the whole grid at once, and return the seconds and the value of every cell."""
    start = time.perf_counter()
    patch = getattr(patching, f"get_act_patch_{grid.patch}")
    values = patch(model, prompts.corrupted, cache, METRIC, verbose=False)
    return time.perf_counter() - start, values.flatten()


# Measuring


def measure(model: HookedTransformer, peers: Sequence[Peer], n_cells: int, rounds: int, long: bool) -> Iterator[Result]:
    """Yield the results of every grid."""
    for prompts, grids in plan(model, long):
        _, cache = model.run_with_cache(prompts.clean)
        for peer in peers:
            peer.ask("set_prompts", clean=prompts.clean.tolist(), corrupted=prompts.corrupted.tolist())
        for grid in grids:
            contestants: dict[str, Contestant] = {LOOP: partial(run_loop, model, prompts, cache, grid)}
            contestants |= {peer.name: partial(ask_peer, peer, grid) for peer in peers}
            times = 1 if len(grid.cells) > MANY_CELLS else rounds
            yield compare(grid, prompts, partial(run_sweep, model, prompts, cache, grid), contestants, n_cells, times)


def compare(
    grid: Grid,
    prompts: Prompts,
    sweep: Callable[[], tuple[float, Tensor]],
    contestants: Mapping[str, Contestant],
    n_cells: int,
    n_rounds: int,
) -> Result:
    """Do a grid some times over: each time by the sweep, and other cells of it by everybody else."""
    n_compared = min(n_cells * n_rounds, len(grid.cells))
    chosen = torch.linspace(0, len(grid.cells) - 1, n_compared).long().tolist()
    for contestant in contestants.values():
        contestant(grid.cells[:1])  # nobody starts cold
    rounds = [one_round(grid, chosen[index::n_rounds], sweep, contestants) for index in range(n_rounds)]
    return Result(
        grid=grid.name,
        prompts=prompts.name,
        cells=len(grid.cells),
        compared=n_compared,
        rounds=n_rounds,
        seconds=Timing(tuple(one.seconds for one in rounds)).median,
        deviation=rounds[-1].values.std().item(),
        beside={name: judge(rounds, name, target_of(grid, name)) for name in contestants},
    )


def one_round(
    grid: Grid, chosen: list[int], sweep: Callable[[], tuple[float, Tensor]], contestants: Mapping[str, Contestant]
) -> Round:
    """Sweep, and let everybody else do half of the chosen cells before that and half after it."""
    halves = chosen[::2], chosen[1::2]
    before = {name: run([grid.cells[place] for place in halves[0]]) for name, run in contestants.items()}
    seconds, values = sweep()
    # Backwards, so that on the average everybody is equally far from the sweep.
    backwards = list(contestants.items())[::-1]
    after = {name: run([grid.cells[place] for place in halves[1]]) for name, run in backwards}
    ours = values[halves[0] + halves[1]]
    others = {}
    for name in contestants:
        taken = (before[name][0] + after[name][0]) * len(grid.cells) / len(chosen)
        theirs = torch.tensor(before[name][1] + after[name][1])
        others[name] = taken, (ours - theirs).abs().max().item()
    return Round(seconds, values, others)


def judge(rounds: Sequence[Round], name: str, target: float | None) -> Comparison:
    """Put somebody's times and values in relation to the sweep's."""
    theirs = Timing(tuple(one.others[name][0] for one in rounds))
    ratio, low, high = theirs.over(Timing(tuple(one.seconds for one in rounds)))
    return Comparison(theirs.median, ratio, (low, high), max(one.others[name][1] for one in rounds), target)


def target_of(grid: Grid, name: str) -> float | None:
    """Return how many times faster than somebody a grid has to be."""
    over_loop, over_peer = TARGETS.get(grid.name, (None, None))
    return over_loop if name == LOOP else over_peer


# Reporting

HEADER = (
    "| grid | prompts | sweep, s | beside | its s | ratio | range | difference | target | met |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def lines(result: Result) -> str:
    """Return the table's lines for one grid, one for each that it is compared with."""
    return "\n".join(
        f"| {result.grid} | {result.prompts} | {result.seconds:.2f} | {name} | {row.seconds:.1f} | {row.ratio:.1f} "
        f"| {row.ratio_range[0]:.1f}-{row.ratio_range[1]:.1f} | {row.largest_difference:.1e} "
        + ("| none | |" if row.target is None else f"| {row.target:g} | {'yes' if row.ratio >= row.target else 'no'} |")
        for name, row in result.beside.items()
    )


def peer_option(text: str) -> tuple[str, str]:
    """Read `NAME=PYTHON`."""
    try:
        return interpreter_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=peer_option, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--cells", type=int, default=12, help="cells a round that loop and peers do")
    parser.add_argument("--rounds", type=int, default=3, help=f"for grids of up to {MANY_CELLS} cells; others have one")
    parser.add_argument("--long", action="store_true", help="the residual grid at 128 tokens too")
    parser.add_argument("--threads", type=int, default=2, help="here and in the peers")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the results if asked to."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    interpreters = dict(arguments.peer)
    skipped = [name for name in PEERS if name not in interpreters]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder, random_gpt2())
        model = HookedTransformer.from_pretrained_no_processing(str(folder / "huggingface"))
        peers = [stack.enter_context(start_peer(name, python)) for name, python in interpreters.items()]
        versions = {peer.name: peer.ask("begin", threads=arguments.threads) for peer in peers}
        for peer in peers:
            peer.ask("load", folder=str(folder))
        for name, found in versions.items():
            print(f"{name}: {', '.join(f'{library} {version}' for library, version in found.items())}")
        for name in skipped:
            print(f"{name}: skipped, for want of --peer {name}=PYTHON")
        print(HEADER, flush=True)
        results = []
        for result in measure(model, peers, arguments.cells, arguments.rounds, arguments.long):
            results.append(result)
            print(lines(result), flush=True)
    if arguments.json:
        report = {"machine": machine(), "peers": versions, "skipped": skipped, "results": list(map(asdict, results))}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    check_equal(results)


def check_equal(results: Sequence[Result]) -> None:
    """Fail if anybody computed something else: then there was nothing to compare."""
    wrong = [
        f"{result.grid}, {result.prompts}: {row.largest_difference:.1e} from {name}"
        for result in results
        for name, row in result.beside.items()
        if not row.largest_difference <= TOLERANCE
    ]
    if wrong:
        raise SystemExit("values differ:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
