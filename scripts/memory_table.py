"""Write the page on the memory of large models: `python -m scripts.memory_table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hooked_lm import HookedTransformerConfig
from hooked_lm.cli.memory import MemoryUse, memory_use, readable_bytes
from hooked_lm.components.spread import layers_by_device
from hooked_lm.tracing.estimate import estimate_runs

__all__ = ["CONFIGS", "LENGTH", "PAGE", "memory_page"]

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "large_models.md"
LENGTH = 1024

_LLAMA: dict[str, Any] = {
    "n_ctx": 2048,
    "positional_embedding_type": "rotary",
    "rotary_dim": 128,
    "d_head": 128,
    "n_key_value_heads": 8,
    "gated_mlp": True,
    "act_fn": "silu",
    "normalization_type": "RMS",
}
# Sizes as published with each checkpoint.
CONFIGS: dict[str, HookedTransformerConfig] = {
    "GPT-2": HookedTransformerConfig(
        n_layers=12,
        d_model=768,
        n_heads=12,
        d_mlp=3072,
        d_vocab=50257,
        n_ctx=1024,
        act_fn="gelu_new",
        tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": HookedTransformerConfig(
        n_layers=32, d_model=4096, n_heads=32, d_mlp=14336, d_vocab=128256, **_LLAMA
    ),
    "Mixtral 8x7B": HookedTransformerConfig(
        n_layers=32,
        d_model=4096,
        n_heads=32,
        d_mlp=14336,
        d_vocab=32000,
        num_experts=8,
        experts_per_token=2,
        **_LLAMA,
    ),
    "Llama 3.1 70B": HookedTransformerConfig(
        n_layers=80, d_model=8192, n_heads=64, d_mlp=28672, d_vocab=128256, **_LLAMA
    ),
}

_TEXT = """\
# Models larger than one device

## How large is it?

`hooked-lm info MODEL --memory` prints how much memory a model needs in each precision. It is computed from the
config: a folder with a `config.json` and no weights will do. The table has some published models. Keys and values
are those of one token in the key-value cache; the activation cache is that of `run_with_cache` without
`names_filter`, for one prompt of {length:,} tokens; the patching grid is what a grid of `resid_pre` at every layer
and position of that prompt keeps, besides the `memory_budget` of the sweep, 512 MiB. All three are in bfloat16.

| model | weights, float32 | weights, bfloat16 | keys and values per token | activation cache | patching grid |
|---|---:|---:|---:|---:|---:|
{rows}

Attention scores and patterns grow with the square of the prompt's length, all other activations with the length.
Name the activations that an experiment needs in `names_filter`: they take a small part of a whole cache. [Save
memory](memory.md) has the other ways.

## Several devices, one process

`model.spread(devices)` puts the blocks on several devices, one after the other:

```py
model = HookedTransformer.from_pretrained("meta-llama/Llama-3.1-70B", dtype=torch.bfloat16)  # on the CPU
model.spread([f"cuda:{{index}}" for index in range(8)])
```

Load on the CPU first: weights that need no processing stay maps of their files, so that no second copy is made.
Blocks are divided so that the fullest device holds as little as possible; `model.spread({{"cuda:0": 30, "cuda:1":
50}})` says how many go where.

Hooks, interventions and key-value caches work where their block is. Everything else, embeddings, final norm and
unembedding, is on the first device, and so is what goes in and what comes out: tokens, logits, residual streams,
cached activations, stacked weights. So nothing that you combine is apart, at the price of one move back in each
pass; `run_with_cache(..., device="cpu")` takes a cache elsewhere. Traces, sweeps, patching, generation and
gradients work unchanged, and give the numbers of one device. `model.to(device)` undoes it.

```python
import torch

from hooked_lm import HookedTransformer
from hooked_lm.components.spread import layers_by_device

model = HookedTransformer.from_pretrained("demo-tasks-4l")
print(model.spread(["cpu"]).spread_over)  # one device: nothing is spread
gpus = [torch.device("cuda", index) for index in range(8)]
block, rest = {block:_}, {rest:_}  # bytes of Llama 3.1 70B in bfloat16
placed = layers_by_device([block] * 80, rest, gpus, [False] * 80)
print([placed.count(gpu) for gpu in gpus])
```

```text
None
{counts}
```

The devices work one after another. That is no loss for a model that does not fit otherwise, and no gain for one
that does.

## Several processes

`hooked_lm.parallel` shares out heads and neurons among processes, so that all devices work on every layer (Shoeybi
et al. 2019). Each process runs the same script:

```py
# python -m torch.distributed.run --nproc-per-node 8 script.py
import torch
import torch.distributed as dist
from hooked_lm import parallel

dist.init_process_group("nccl")
torch.cuda.set_device(dist.get_rank())
model = parallel.load("meta-llama/Llama-3.1-70B", device=f"cuda:{{dist.get_rank()}}", dtype=torch.bfloat16)
logits, cache = model.run_with_cache(tokens, names_filter="blocks.40.attn.hook_z")
```

The checkpoint is read block by block, of which each process keeps its part. Two sums over the processes in each
block make the whole stream; embeddings, norms and the unembedding are whole in each. **Hooks see whole
activations**: where something listens at a head, a pattern or a neuron, the parts are gathered, there and nowhere
else. Logits, caches, edits, gradients, traces and generation are those of one process, to rounding; ranks that draw
different tokens take the first one's. `parallel.shard(model)` does it to a model that is there.

Heads have to divide by the number of processes, and so do neurons; key-value heads that are fewer have copies.
`model.W_O` and the like gather whole weights. What reads the weights of single components (`stack_head_results`,
full circuits), saving and processing raise: do them on one device. Sweeps run the model once for each cell.
Gradients do not go through `hook_q_input` and its like. A mixture's experts each have a share of every process's
neurons, which divides the work however tokens choose. A process that is lost, or silent for the group's timeout, is
an error in the others.

`hooked-lm serve MODEL --ranks 8` serves such a model to others, who need none of this, and so does `python -m
torch.distributed.run --nproc-per-node 8 -m hooked_lm.cli serve MODEL`: see [Serve a model](serve.md).

For training, `torch.distributed.fsdp.fully_shard` takes a model after `parallel.make_contiguous(model)`.

## 70 billion parameters on eight devices of 80 GB

Llama 3.1 70B has {parameters:.2f} billion parameters, with the biases that its checkpoint lacks and the model holds
as zeros. In bfloat16 they take {weights:.0f} GB, {share:.1f} GB for each of eight devices if the layers are divided
equally; {with_embeddings:.1f} GB where each process has the embeddings whole. Keys and values take {cache:.0f} KiB
a token, {cache_share:.0f} KiB on each device.

A function-vector experiment of 32 prompts of 60 tokens and 100 of 8 takes {petaflop:.2f} PFLOP. Eight devices that
reach 40 % of 989 TFLOP/s each need {seconds:.2f} s for it, and a step of decoding at least {step:.1f} ms, the time
to read the weights at 3.35 TB/s. What comes back of a server is {vector:.0f} KiB and a score for each prompt, where
the streams of one layer at all positions are {streams:.0f} MB.
"""


def memory_page() -> str:
    """Return the page, with every number computed from the configs."""
    halves = {name: memory_use(cfg, torch.bfloat16, LENGTH) for name, cfg in CONFIGS.items()}
    largest = halves["Llama 3.1 70B"]
    cfg = CONFIGS["Llama 3.1 70B"]
    block, rest = _bytes_of_block(cfg), largest.weights - cfg.n_layers * _bytes_of_block(cfg)
    devices = [torch.device("cuda", index) for index in range(8)]
    placed = layers_by_device([block] * cfg.n_layers, rest, devices, [False] * cfg.n_layers)
    flops = estimate_runs("pass", cfg, 32, 60).flops + estimate_runs("pass", cfg, 100, 8).flops
    return _TEXT.format(
        block=block,
        rest=rest,
        counts=[placed.count(device) for device in devices],
        with_embeddings=(largest.weights + 7 * rest) / 8e9,
        petaflop=flops / 1e15,
        seconds=flops / (8 * 0.4 * 989e12),
        step=1e3 * largest.weights / (8 * 3.35e12),
        vector=4 * cfg.d_model / 1024,
        streams=2 * cfg.d_model * (32 * 60 + 100 * 8) / 1e6,
        length=LENGTH,
        rows="\n".join(_row(name, half) for name, half in halves.items()),
        parameters=largest.weights / 2e9,
        weights=largest.weights / 1e9,
        share=largest.weights / 8e9,
        cache=largest.cache_per_token / 1024,
        cache_share=largest.cache_per_token / 8192,
    )


def _bytes_of_block(cfg: HookedTransformerConfig) -> int:
    one = memory_use(cfg.replace(n_layers=1), torch.bfloat16, LENGTH).weights
    return memory_use(cfg.replace(n_layers=2), torch.bfloat16, LENGTH).weights - one


def _row(name: str, half: MemoryUse) -> str:
    sizes = (2 * half.weights, half.weights, half.cache_per_token, half.activations, half.patching_grid)
    return f"| {name} | " + " | ".join(map(readable_bytes, sizes)) + " |"


if __name__ == "__main__":
    PAGE.write_text(memory_page())
