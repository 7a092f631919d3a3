"""The cases of test_nnsight.py in nnsight 0.8, for an interpreter that has it: `nnsight_cases.py FOLDER OUTCOMES`.

The folder holds a GPT-2 checkpoint and its tokenizer. The outcomes are written as safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

Outcome = dict[str, Tensor]

SHOWN = torch.tensor([[3, 4, 5, 6, 7], [5, 6, 7, 8, 9], [9, 3, 8, 4, 6]])
ASKED = torch.tensor([[3, 9], [5, 4], [9, 7]])
SHORT, LONG = [4, 8, 3], [7, 5, 3, 9, 8, 6]


def model_of(folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer, dispatch=True)


def talk(model: Any) -> Outcome:
    """The mean state of prompts with examples, added to the stream of prompts without."""
    h = model.transformer.h
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(SHOWN):
            state = h[1].output[:, -1].mean(0).save()
            barrier()
        with tracer.invoke(ASKED):
            barrier()
            h[1].output[:, -1] += state
            steered = model.lm_head.output[:, -1].log_softmax(-1).save()
    with model.trace(ASKED):
        plain = model.lm_head.output[:, -1].log_softmax(-1).save()
    return {"state": state, "steered": steered, "plain": plain}


def edits(model: Any) -> Outcome:
    """Reads before and behind edits, and a module whose output is zero."""
    h = model.transformer.h
    with model.trace(SHOWN):
        before = h[0].output.clone().save()
        h[0].output[:, 2] = 0
        after = h[0].output.clone().save()
        kept = h[0].output.save()  # without a clone
        h[0].output[:, 0] *= 2
        z = h[1].attn.c_proj.input.save()
        h[1].mlp.output[:] = 0
        logits = model.lm_head.output.save()
    return {"before": before, "after": after, "kept": kept, "z": z, "logits": logits}


def lengths(model: Any) -> Outcome:
    """Two prompts of unequal lengths in one trace."""
    h = model.transformer.h
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            short = h[1].output[:, -1].save()
            first = h[1].output[:, 0].save()
        with tracer.invoke(LONG):
            long = h[1].output[:, -1].save()
    return {"short": short, "first": first, "long": long}


def gradients(model: Any) -> Outcome:
    """Gradients of three prompts' log-probabilities at two layers."""
    h = model.transformer.h
    with model.trace(SHOWN):
        h[0].output.requires_grad_(True)
        early, late = h[0].output, h[1].output
        loss = model.lm_head.output[:, -1].log_softmax(-1)[:, 5].sum()
        with loss.backward():
            at_late = late.grad.save()
            at_early = early.grad.save()
    return {"early": at_early, "late": at_late}


def steps(model: Any) -> Outcome:
    """A generation that is edited at every step but the first."""
    h = model.transformer.h
    with model.generate(SHOWN, max_new_tokens=3, do_sample=False) as tracer:
        states = [].save()  # type: ignore[attr-defined]
        for step in tracer.iter[0:3]:
            if step > 0:
                h[0].output[:, -1] += 0.5
            states.append(h[1].output[:, -1].clone())
        tokens = tracer.result.save()
    return {"states": torch.stack(list(states)), "tokens": tokens[:, SHOWN.shape[1] :]}


def main() -> None:
    folder, outcomes = map(Path, sys.argv[1:])
    model = model_of(folder)
    found = {
        f"{case.__name__}.{name}": value.detach().clone(memory_format=torch.contiguous_format)
        for case in (talk, edits, lengths, gradients, steps)
        for name, value in case(model).items()
    }
    save_file(found, outcomes)


if __name__ == "__main__":
    main()
