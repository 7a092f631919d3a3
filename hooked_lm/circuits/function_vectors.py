"""Function vectors: the task that a few examples in the prompt define, as one direction that can be put elsewhere.

At the last token of an in-context prompt ("hot:cold, big:small, up:") a few heads write what the task is. Their mean
outputs over many such prompts sum to a vector that, added to the stream of a prompt without examples, makes the model
do the task (Todd et al. 2024, "Function Vectors in Large Language Models"). The whole stream there serves in the same
way (Hendel et al. 2023, "In-Context Learning Creates Task Vectors").

    mean_z = mean_head_outputs(model, task_prompts)                      # what the heads hold while doing the task
    effects = head_effects(model, shuffled_prompts, answers, mean_z)     # which of them bring the task back
    task = function_vector(model, mean_z, effects, n_heads=10)           # what these heads write
    steering_effect(model, zero_shot_prompts, answers, task)             # where it works
    model.generate(prompt, interventions=[task.intervention(layer=9)])

Streams are read and changed at the end of a block, `hook_resid_post`, and every prompt at its own last token: padding
on either side makes no difference.
"""

from __future__ import annotations

from hooked_lm.circuits.last_token import Answers
from hooked_lm.circuits.steering import Operation, SteeringEffect, steering_effect
from hooked_lm.circuits.task_heads import FunctionVector, Head, HeadEffects, Measure, function_vector, head_effects
from hooked_lm.circuits.task_means import mean_head_outputs, mean_state

__all__ = [
    "Answers",
    "FunctionVector",
    "Head",
    "HeadEffects",
    "Measure",
    "Operation",
    "SteeringEffect",
    "function_vector",
    "head_effects",
    "mean_head_outputs",
    "mean_state",
    "steering_effect",
]
