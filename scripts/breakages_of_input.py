"""Faults of batches, padding, wrong values and code that comes with a checkpoint."""

from __future__ import annotations

from scripts.breakage import Breakage

__all__ = ["OF_INPUT"]

OF_INPUT = (
    # Batches and padding
    Breakage(
        "batch-slice-leaves-the-stack-whole",
        "hooked_lm/activation_cache/streams.py",
        r"return stack if batch\.is_identity else batch\.apply\(stack, dim=stack\.ndim - 1 - len\(run\)\)",
        "return stack",
        ("test_cache_attributions.py",),
    ),
    Breakage(
        "one-scale-is-broadcast-over-a-stack",
        "hooked_lm/activation_cache/streams.py",
        r"if came != tuple\(lead\) or",
        "if len(came) != len(lead) or",
        ("test_cache_attributions.py",),
    ),
    Breakage(
        "cache-forgets-the-padding-of-its-run",
        "hooked_lm/activation_cache/recording.py",
        r"passes\[0\]\.mask if passes else None",
        "None",
        ("test_padded_caches.py",),
    ),
    Breakage(
        "saved-cache-forgets-the-padding-of-its-run",
        "hooked_lm/activation_cache/file.py",
        r"if self\.attention_mask is not None:",
        "if False:",
        ("test_padded_caches.py",),
    ),
    Breakage(
        "last-position-may-be-padding",
        "hooked_lm/activation_cache/mapping.py",
        r"padded = torch\.where\(~picked\.bool\(\)\.any\(1\)\)\[0\]\.tolist\(\)",
        "padded: list[int] = []",
        ("test_padded_caches.py",),
    ),
    Breakage(
        "mean-counts-padding",
        "hooked_lm/interventions/masked.py",
        r"return own if given is None else given\.to\(own\) \* own",
        "return given",
        ("test_padded_caches.py",),
    ),
    Breakage(
        "clean-cache-may-be-padded-elsewhere",
        "hooked_lm/patching/sites.py",
        r"if sites and isinstance\(clean, ActivationCache\):",
        "if False:",
        ("test_padded_caches.py",),
    ),
    Breakage(
        "accuracy-counts-padding",
        "hooked_lm/losses.py",
        r"return correct if per_token else correct\.sum\(\) / counts\.sum\(\)",
        "return correct if per_token else correct.float().mean()",
        ("test_padded_caches.py",),
    ),
    # Values of the wrong kind, and code that comes with a checkpoint
    Breakage(
        "loss-of-other-classes-than-tokens",
        "hooked_lm/transformer.py",
        r"if self\.cfg\.d_vocab_out != self\.cfg\.d_vocab:",
        "if False:",
        ("test_bad_values.py",),
    ),
    Breakage(
        "nan-logits-have-a-likeliest-token",
        "hooked_lm/generation/decoding.py",
        r"wrong = torch\.where\(logits\.isnan\(\)\.any\(-1\)\)\[0\]\.tolist\(\)",
        "wrong: list[int] = []",
        ("test_bad_values.py",),
    ),
    Breakage(
        "an-empty-index-is-an-index",
        "hooked_lm/slicing.py",
        r"if np\.prod\(np\.shape\(given\)\) == 0:",
        "if False:",
        ("test_bad_values.py",),
    ),
    Breakage(
        "neither-yes-nor-no-asks-on-the-terminal",
        "weight_conversion/tokenizers.py",
        r"return trust_remote_code is True",
        "return trust_remote_code  # type: ignore[return-value]",
        ("test_custom_code.py",),
    ),
    Breakage(
        "tokenizer-of-own-code-becomes-a-general-one",
        "weight_conversion/tokenizers.py",
        r"if own and not trust_remote_code and",
        "if False and",
        ("test_custom_code.py",),
    ),
    # Tokenizers and config fields
    Breakage(
        "text-with-bos-gets-a-second",
        "hooked_lm/tokenization/functions.py",
        r"return tokens if start and tokens\[:1\] == start else start \+ tokens",
        "return start + tokens",
        ("test_model_tokenizer.py",),
    ),
    Breakage(
        "padding-side-of-the-tokenizer-is-its-own",
        "hooked_lm/tokenization/linked.py",
        r'"padding_side": property\(_padding_side, _set_padding_side\),',
        "",
        ("test_model_tokenizer.py",),
    ),
    Breakage(
        "token-without-a-row-goes-on",
        "hooked_lm/tokenization/methods.py",
        r"if token >= self\.cfg\.d_vocab:",
        "if False:",
        ("test_model_tokenizer.py",),
    ),
    Breakage(
        "fields-that-are-read-are-skipped",
        "weight_conversion/reference.py",
        r"return self\._names is None or name in self\._names",
        "return False",
        ("test_loading_configs.py",),
    ),
)
