"""What bad_values_checks.py says of values of the wrong kind holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_values_of_the_wrong_kind_raise_and_say_why() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "tests/bad_values_checks.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
