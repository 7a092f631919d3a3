"""What compile_checks.py says of `torch.compile` holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_compiled_models_compute_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "tests/compile_checks.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
