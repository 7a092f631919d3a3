"""The rooms of the package, in the order in which they may import from each other."""

from __future__ import annotations

# From the first room to the last. `__init__` stands for `import hooked_lm`, which gives out every name.
ORDER = (
    *("_support", "bundled", "config", "names", "slicing", "factored_matrix", "losses"),
    *("hooks", "hook_points", "kv_cache", "components"),
    *(
        "tokenization",
        "interventions",
        "hooked_model",
        "metrics",
        "activation_cache",
        "weight_conversion",
        "weights",
        "weight_processing",
        "generation",
        "sweep",
        "tracing",
    ),
    *("transformer", "certificate", "parallel", "remote", "workers", "patching", "circuits", "utils", "head_detector"),
    *("training", "tasks", "evals", "plotting", "probing", "examples"),
    *("hypotheses", "profiling", "fourier", "comparison", "datasets", "patchscopes", "surgery", "sparsity"),
    *("experiments", "explorer", "demo"),
    *("__init__", "cli", "__main__", "compat"),
)
