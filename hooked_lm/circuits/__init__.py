"""Circuits, from weights and activations: heads, composition, full circuits, attribution, routes, function vectors.

`logit_lens` is the module, as it always was: its function is `hooked_lm.circuits.logit_lens.logit_lens`.
"""

from hooked_lm.circuits.composition import CompositionScores, chance_of_square, head_composition, pairs_table
from hooked_lm.circuits.direct_logit import LogitAttribution, hooks_for_attribution, logit_attribution
from hooked_lm.circuits.directions import DirectionHead, HeadDirections, reading_heads, writing_heads
from hooked_lm.circuits.full_circuits import (
    TopEntries,
    full_ov_circuit,
    full_qk_circuit,
    token_embeddings,
    top1_accuracy,
    top_entries,
)
from hooked_lm.circuits.function_vectors import (
    FunctionVector,
    HeadEffects,
    SteeringEffect,
    function_vector,
    head_effects,
    mean_head_outputs,
    mean_state,
    steering_effect,
)
from hooked_lm.circuits.heads import (
    HeadScores,
    attention_scores,
    copying_scores,
    duplicate_token_pattern,
    eigenvalue_score,
    induction_pattern,
    matching_scores,
    previous_token_pattern,
    register_head_pattern,
    repeated_token_scores,
)
from hooked_lm.circuits.induction import (
    NextTokenScores,
    induction_scores,
    k_composition_qk_circuit,
    next_token_scores,
    previous_token_scores,
    repeated_random_tokens,
    strongest_head,
)
from hooked_lm.circuits.logit_lens import LogitLens, read_out
from hooked_lm.circuits.routes import information_routes
from hooked_lm.circuits.routes_result import InformationRoutes, RouteEdge, RouteNode
from hooked_lm.circuits.svd import CircuitVectors, SVDInterpreter, circuit_vectors

__all__ = [
    "CircuitVectors",
    "CompositionScores",
    "DirectionHead",
    "FunctionVector",
    "HeadDirections",
    "HeadEffects",
    "HeadScores",
    "InformationRoutes",
    "LogitAttribution",
    "LogitLens",
    "NextTokenScores",
    "RouteEdge",
    "RouteNode",
    "SVDInterpreter",
    "SteeringEffect",
    "TopEntries",
    "attention_scores",
    "chance_of_square",
    "circuit_vectors",
    "copying_scores",
    "duplicate_token_pattern",
    "eigenvalue_score",
    "full_ov_circuit",
    "full_qk_circuit",
    "function_vector",
    "head_composition",
    "head_effects",
    "hooks_for_attribution",
    "induction_pattern",
    "induction_scores",
    "information_routes",
    "k_composition_qk_circuit",
    "logit_attribution",
    "matching_scores",
    "mean_head_outputs",
    "mean_state",
    "next_token_scores",
    "pairs_table",
    "previous_token_pattern",
    "previous_token_scores",
    "read_out",
    "reading_heads",
    "register_head_pattern",
    "repeated_random_tokens",
    "repeated_token_scores",
    "steering_effect",
    "strongest_head",
    "token_embeddings",
    "top1_accuracy",
    "top_entries",
    "writing_heads",
]
