"""Faults in derivatives beyond the first, in `torch.func` on the model, and with tensors of inference mode."""

from __future__ import annotations

from scripts.breakage import Breakage

COMPONENTS = "hooked_lm/components"
AUTOGRAD, FUNC, INFERENCE = ("test_autograd.py",), ("test_torch_func.py",), ("test_inference_tensors.py",)

DERIVATIVES = (
    Breakage(
        "gradient-with-a-graph-is-left-to-the-fused-kernel",
        f"{COMPONENTS}/fused.py",
        r"if not \(torch\.is_grad_enabled\(\) or transforms_active\(\)\):",
        "if True:",
        AUTOGRAD,
    ),
    Breakage(
        "every-gradient-forms-the-pattern",
        f"{COMPONENTS}/fused.py",
        r"if not \(torch\.is_grad_enabled\(\) or transforms_active\(\)\):",
        "if False:",
        AUTOGRAD,
    ),
    Breakage(
        "plain-gradient-lacks-the-softmax-term",
        f"{COMPONENTS}/fused.py",
        r"\(to_pattern - \(to_pattern \* pattern\)\.sum\(-1, keepdim=True\)\)",
        "to_pattern",
        AUTOGRAD,
    ),
    Breakage(
        "plain-gradient-forgets-the-mask",
        f"{COMPONENTS}/fused.py",
        r"    if mask is not None:\n        scores =",
        "    if mask is None:\n        scores =",
        AUTOGRAD,
    ),
    Breakage(
        "plain-gradient-looks-ahead",
        f"{COMPONENTS}/fused.py",
        r"device=scores\.device\)\.tril\(\)",
        "device=scores.device).tril(1)",
        AUTOGRAD,
    ),
    Breakage(
        "plain-gradient-gives-groups-the-wrong-key-head",
        f"{COMPONENTS}/fused.py",
        r"reshape\(-1, kv_heads, group, \*one\.shape\[2:\]\)\.sum\(2\)",
        "reshape(-1, group, kv_heads, *one.shape[2:]).sum(1)",
        AUTOGRAD,
    ),
    Breakage(
        "attention-stays-fused-in-a-transform",
        f"{COMPONENTS}/attention.py",
        r" or self\.sinks is not None or transforms_active\(\)",
        " or self.sinks is not None",
        ("test_autograd.py", "test_torch_func.py"),
    ),
    Breakage(
        "derivative-of-a-bias-of-zeros-is-lost",
        f"{COMPONENTS}/embed.py",
        r"\(self\.b_U\.requires_grad and torch\.is_grad_enabled\(\)\) or transforms_active\(\)",
        "self.b_U.requires_grad and torch.is_grad_enabled()",
        ("test_autograd.py", "test_torch_func.py"),
    ),
    Breakage(
        "tied-unembedding-takes-a-parameter-without-effect",
        f"{COMPONENTS}/embed.py",
        r'            self\.untie\(\)\n        if name == "W_U" and isinstance',
        '            pass\n        if name == "W_U" and isinstance',
        "test_tied_embeddings.py",
    ),
    Breakage(
        "copies-equal-to-the-stream-have-no-derivative-of-their-own",
        f"{COMPONENTS}/head_inputs.py",
        r"\[True\] \* copies\.shape\[2\] if transforms_active\(\) else source\.edited_heads\(\)",
        "source.edited_heads()",
        ("test_autograd.py", "test_torch_func.py"),
    ),
    Breakage(
        "second-derivative-at-copies-is-wrong-in-silence",
        f"{COMPONENTS}/head_inputs.py",
        r"if torch\.is_grad_enabled\(\):  # the gradient may be differentiated",
        "if False:",
        AUTOGRAD,
    ),
    Breakage(
        "experts-of-a-batch-are-unweighted",
        f"{COMPONENTS}/moe.py",
        r"weights\.where\(chosen, 0\.0\)\.sum\(-1, keepdim=True\)",
        "weights.sum(-1, keepdim=True)",
        FUNC,
    ),
    Breakage(
        "experts-that-no-token-chose-are-added",
        f"{COMPONENTS}/moe.py",
        r"contribution\.where\(chosen\.any\(-1, keepdim=True\), 0\.0\)",
        "contribution",
        FUNC,
    ),
    Breakage(
        "frequencies-of-a-transform-are-kept",
        f"{COMPONENTS}/positions.py",
        r"keeps = not \(torch\.compiler\.is_compiling\(\) or transforms_active\(\)\)\n    return \(_fixed",
        r"keeps = not torch.compiler.is_compiling()\n    return (_fixed",
        FUNC,
    ),
    Breakage(
        "padding-that-cannot-be-read-is-ignored",
        "hooked_lm/tokenization/inputs.py",
        r"not \(values_readable\(attention_mask\) and bool\(attention_mask\.all\(\)\)\)",
        "values_readable(attention_mask) and not bool(attention_mask.all())",
        FUNC,
    ),
    Breakage(
        "padding-in-tokens-that-cannot-be-read-is-not-inferred",
        "hooked_lm/tokenization/functions.py",
        r"if values_readable\(padded\) and not bool\(padded\.any\(\)\)",
        "if not values_readable(padded) or not bool(padded.any())",
        FUNC,
    ),
    Breakage(
        "key-value-cache-drops-derivatives-forwards",
        "hooked_lm/kv_cache.py",
        r"if in_a_graph or transforms_active\(\):",
        "if in_a_graph:",
        FUNC,
    ),
    Breakage(
        "lazy-cache-is-made-in-a-transform",
        "hooked_lm/activation_cache/recording.py",
        r"if not \(keep_graph or transforms_active\(\)\):",
        "if not keep_graph:",
        FUNC,
    ),
    Breakage(
        "norm-is-fused-in-a-transform",
        "hooked_lm/components/norm.py",
        r"if transforms_active\(\):",
        "if False:",
        FUNC,
    ),
    Breakage(
        "returned-inference-tensor-goes-on-as-it-is",
        "hooked_lm/hooks/handle.py",
        r"as_differentiable\(self\._checked\(returned, x, mixed\)\)",
        "self._checked(returned, x, mixed)",
        INFERENCE,
    ),
    Breakage(
        "cache-entry-of-inference-mode-is-copied-at-each-reading",
        "hooked_lm/activation_cache/mapping.py",
        r"self\.cache_dict\.update\(dict\.fromkeys\(\(name, \*same\), usable\)\)",
        "pass",
        INFERENCE,
    ),
    # Detached caches
    Breakage(
        "cache-between-two-editors-parts-their-tensor",
        "hooked_lm/hooks/point.py",
        r"if shared and not \(handle\.keep_graph and x\.requires_grad\):",
        "if shared and not x.requires_grad:",
        ("test_detached_caches.py",),
    ),
    Breakage(
        "default-cache-keeps-its-graph",
        "hooked_lm/hooks/recorder.py",
        r"x if self\.keep_graph else x\.detach\(\)",
        "x",
        ("test_detached_caches.py",),
    ),
    Breakage(
        "unfiltered-cache-does-not-read-the-flags",
        "hooked_lm/activation_cache/recording.py",
        r"return asked or super\(\)\.is_recorded_by_default\(point\)",
        "return super().is_recorded_by_default(point)",
        ("test_caching.py",),
    ),
    Breakage(
        "run-goes-through-what-a-detached-cache-records",
        "hooked_lm/hooks/point.py",
        r"gradients and point\.keeps_graph\)\)",
        "gradients))",
        ("test_detached_caches.py",),
    ),
)
