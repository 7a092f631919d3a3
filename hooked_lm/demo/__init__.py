"""The contents of `hooked-lm demo`: the induction circuit of one bundled model, and a tour of another."""

from hooked_lm.demo.induction import (
    HELD_OUT_LENGTHS,
    MODEL,
    STEPS,
    DemoResult,
    label,
    plain_data,
    random_tokens,
    run_demo,
)

__all__ = ["HELD_OUT_LENGTHS", "MODEL", "STEPS", "DemoResult", "label", "plain_data", "random_tokens", "run_demo"]
