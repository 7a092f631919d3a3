"""Faults in reading and writing files, each with the tests that should notice it."""

from __future__ import annotations

from scripts.breakage import Breakage

__all__ = ["FILES"]

FILES = (
    Breakage(
        "last-shard-wins",
        "weight_conversion/source.py",
        r"                if name in self\._paths:\n.+\n                self\._paths\.setdefault\(name, path\)",
        "                self._paths[name] = path",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "last-pickle-wins",
        "weight_conversion/source.py",
        r"if name in tensors and not _same_values\(tensors\[name\], tensor\):",
        "if False:",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "index-may-lead-out-of-its-folder",
        "weight_conversion/source.py",
        r"    if outside:",
        "    if False:",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "integers-of-the-hub-are-weights",
        "weight_conversion/conversion.py",
        r"        self\._check_dtypes\(\)\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "integers-of-our-format-are-weights",
        "weight_conversion/own_format.py",
        r"                tensors\.dtype\(name\)\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "integers-of-a-state-dict-are-weights",
        "hooked_lm/weights/loading.py",
        r"        _check_floats\(weights, dict.+\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "sizes-are-compared-after-building",
        "weight_conversion/own_format.py",
        r"    _check_sizes\(path, cfg, tensors\)\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "halves-of-two-saves-load",
        "weight_conversion/own_format.py",
        r"if digest != said:",
        "if False:",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "config-is-replaced-first",
        "hooked_lm/weights/saving.py",
        r"        \(folder / .config\.json.\)\.unlink\(missing_ok=True\)\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "settings-may-be-infinite",
        "hooked_lm/config/checks.py",
        r"    check_finite\(cfg\)\n",
        "",
        ("test_contradicting_files.py",),
    ),
    Breakage(
        "json-key-may-come-twice",
        "hooked_lm/_support/reading.py",
        r"        if twice:",
        "        if False:",
        (
            "test_contradicting_files.py",
            "test_damaged_files.py",
        ),
    ),
    Breakage(
        "mapped-file-may-change",
        "hooked_lm/_support/reading.py",
        r"if now != self\.state:",
        "if False:",
        (
            "test_contradicting_files.py",
            "test_damaged_files.py",
        ),
    ),
    Breakage(
        "cache-of-another-model-loads",
        "hooked_lm/activation_cache/mapping.py",
        r"        if differ:",
        "        if False:",
        ("test_damaged_files.py",),
    ),
    Breakage(
        "old-cache-of-another-model-loads",
        "hooked_lm/activation_cache/of_model.py",
        r"size not in sizes\.get\(axis, \{size\}\)",
        "False",
        ("test_damaged_files.py",),
    ),
    Breakage(
        "cache-forgets-its-model",
        "hooked_lm/activation_cache/recording.py",
        r"            sizes=sizes_of\(self\.cfg\),\n",
        "",
        ("test_damaged_files.py",),
    ),
)
