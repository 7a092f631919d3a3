"""hooked_lm: a transformer you can look inside.

Names are resolved when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_lm import components as components
    from hooked_lm import evals as evals
    from hooked_lm import experiments as experiments
    from hooked_lm import head_detector as head_detector
    from hooked_lm import metrics as metrics
    from hooked_lm import patching as patching
    from hooked_lm import tasks as tasks
    from hooked_lm import training as training
    from hooked_lm import utils as utils
    from hooked_lm import weights as weights
    from hooked_lm.activation_cache import ActivationCache as ActivationCache
    from hooked_lm.certificate import Certificate as Certificate
    from hooked_lm.certificate import verify as verify
    from hooked_lm.circuits.svd import SVDInterpreter as SVDInterpreter
    from hooked_lm.config import HookedTransformerConfig as HookedTransformerConfig
    from hooked_lm.factored_matrix import FactoredMatrix as FactoredMatrix
    from hooked_lm.hooks import HookedRootModule as HookedRootModule
    from hooked_lm.hooks import HookPoint as HookPoint
    from hooked_lm.interventions import Intervention as Intervention
    from hooked_lm.interventions.files import load_interventions as load_interventions
    from hooked_lm.interventions.files import save_interventions as save_interventions
    from hooked_lm.kv_cache import HookedTransformerKeyValueCache as HookedTransformerKeyValueCache
    from hooked_lm.names import UnknownHookError as UnknownHookError
    from hooked_lm.slicing import Slice as Slice
    from hooked_lm.transformer import HookedTransformer as HookedTransformer
    from weight_conversion.errors import CheckpointError as CheckpointError

__version__ = "0.1.0"

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
    "SVDInterpreter": "hooked_lm.circuits.svd",
    "Intervention": "hooked_lm.interventions",
    "Slice": "hooked_lm.slicing",
    "UnknownHookError": "hooked_lm.names",
    "load_interventions": "hooked_lm.interventions.files",
    "save_interventions": "hooked_lm.interventions.files",
    "verify": "hooked_lm.certificate",
}
_MODULES = (
    "components",
    "evals",
    "experiments",
    "head_detector",
    "metrics",
    "patching",
    "tasks",
    "training",
    "utils",
    "weights",
)

__all__ = [*_HOMES, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"hooked_lm.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hooked_lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
