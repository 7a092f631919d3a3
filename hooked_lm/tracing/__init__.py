"""Tracing: a whole experiment as a graph that is checked, planned and then run."""

from hooked_lm.tracing.errors import TraceError
from hooked_lm.tracing.estimate import PassEstimate, TraceEstimate
from hooked_lm.tracing.methods import load
from hooked_lm.tracing.ops import OPS, TraceOp, register_op
from hooked_lm.tracing.runs import Run, Site
from hooked_lm.tracing.trace import Trace
from hooked_lm.tracing.types import TensorType
from hooked_lm.tracing.values import Value

__all__ = [
    "OPS",
    "PassEstimate",
    "Run",
    "Site",
    "TensorType",
    "Trace",
    "TraceError",
    "TraceEstimate",
    "TraceOp",
    "Value",
    "load",
    "register_op",
]
