"""hooked_lm: a transformer you can look inside.

Names are resolved when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hooked_lm import circuits as circuits
    from hooked_lm import comparison as comparison
    from hooked_lm import compat as compat
    from hooked_lm import components as components
    from hooked_lm import datasets as datasets
    from hooked_lm import evals as evals
    from hooked_lm import examples as examples
    from hooked_lm import experiments as experiments
    from hooked_lm import fourier as fourier
    from hooked_lm import head_detector as head_detector
    from hooked_lm import hypotheses as hypotheses
    from hooked_lm import interventions as interventions
    from hooked_lm import metrics as metrics
    from hooked_lm import parallel as parallel
    from hooked_lm import patching as patching
    from hooked_lm import patchscopes as patchscopes
    from hooked_lm import plotting as plotting
    from hooked_lm import probing as probing
    from hooked_lm import profiling as profiling
    from hooked_lm import remote as remote
    from hooked_lm import sparsity as sparsity
    from hooked_lm import surgery as surgery
    from hooked_lm import sweep as sweep
    from hooked_lm import tasks as tasks
    from hooked_lm import tracing as tracing
    from hooked_lm import training as training
    from hooked_lm import utils as utils
    from hooked_lm import weights as weights
    from hooked_lm import workers as workers
    from hooked_lm.activation_cache import ActivationCache as ActivationCache
    from hooked_lm.certificate import Certificate as Certificate
    from hooked_lm.certificate import verify as verify
    from hooked_lm.circuits.svd import SVDInterpreter as SVDInterpreter
    from hooked_lm.comparison import compare as compare
    from hooked_lm.config import HookedTransformerConfig as HookedTransformerConfig
    from hooked_lm.factored_matrix import FactoredMatrix as FactoredMatrix
    from hooked_lm.hooks import HookedRootModule as HookedRootModule
    from hooked_lm.hooks import HookPoint as HookPoint
    from hooked_lm.interventions import Intervention as Intervention
    from hooked_lm.interventions import load_interventions as load_interventions
    from hooked_lm.interventions import save_interventions as save_interventions
    from hooked_lm.kv_cache import HookedTransformerKeyValueCache as HookedTransformerKeyValueCache
    from hooked_lm.names import NamesFilter as NamesFilter
    from hooked_lm.names import UnknownHookError as UnknownHookError
    from hooked_lm.remote.client import connect as connect
    from hooked_lm.slicing import Slice as Slice
    from hooked_lm.tokenization import USE_DEFAULT_VALUE as USE_DEFAULT_VALUE
    from hooked_lm.transformer import HookedTransformer as HookedTransformer
    from hooked_lm.transformer import Loss as Loss
    from hooked_lm.transformer import Output as Output
    from weight_conversion.errors import CheckpointError as CheckpointError

__version__ = "0.1.0"

__all__ = [
    "USE_DEFAULT_VALUE",
    "ActivationCache",
    "Certificate",
    "CheckpointError",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HookedTransformerKeyValueCache",
    "Intervention",
    "Loss",
    "NamesFilter",
    "Output",
    "SVDInterpreter",
    "Slice",
    "UnknownHookError",
    "circuits",
    "compare",
    "comparison",
    "compat",
    "components",
    "connect",
    "datasets",
    "evals",
    "examples",
    "experiments",
    "fourier",
    "head_detector",
    "hypotheses",
    "interventions",
    "load_interventions",
    "metrics",
    "parallel",
    "patching",
    "patchscopes",
    "plotting",
    "probing",
    "profiling",
    "remote",
    "save_interventions",
    "sparsity",
    "surgery",
    "sweep",
    "tasks",
    "tracing",
    "training",
    "utils",
    "verify",
    "weights",
    "workers",
]

# Where each name lives; a name that is not here is a module of this package.
_HOMES = {
    "ActivationCache": "hooked_lm.activation_cache",
    "Certificate": "hooked_lm.certificate",
    "CheckpointError": "weight_conversion.errors",
    "FactoredMatrix": "hooked_lm.factored_matrix",
    "HookPoint": "hooked_lm.hooks",
    "HookedRootModule": "hooked_lm.hooks",
    "HookedTransformer": "hooked_lm.transformer",
    "HookedTransformerConfig": "hooked_lm.config",
    "HookedTransformerKeyValueCache": "hooked_lm.kv_cache",
    "Intervention": "hooked_lm.interventions",
    "Loss": "hooked_lm.transformer",
    "NamesFilter": "hooked_lm.names",
    "Output": "hooked_lm.transformer",
    "SVDInterpreter": "hooked_lm.circuits.svd",
    "USE_DEFAULT_VALUE": "hooked_lm.tokenization",
    "compare": "hooked_lm.comparison",
    "connect": "hooked_lm.remote.client",
    "Slice": "hooked_lm.slicing",
    "UnknownHookError": "hooked_lm.names",
    "load_interventions": "hooked_lm.interventions",
    "save_interventions": "hooked_lm.interventions",
    "verify": "hooked_lm.certificate",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hooked_lm' has no attribute {name!r}")
    if name not in _HOMES:
        return importlib.import_module(f"hooked_lm.{name}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
