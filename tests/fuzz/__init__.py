"""A differential fuzzer: random models, prompts, edits and ways of running them, against a naive reference.

`python -m tests.fuzz` (or `make fuzz`) runs until it finds a difference or its time is up; `tests/test_fuzz.py` runs a
few cases of every way. A case follows from its seed alone, so a finding is run again with `--seed`.
"""
