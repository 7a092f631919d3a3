"""What the tests of loading share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_lm import HookedTransformer
from tests.family_rows import ROWS

unprocessed = HookedTransformer.from_pretrained_no_processing
# Families that differ in what their parameters are made of: fused tensors, tensors read twice, absent biases, experts.
ASSORTED = ["gpt2", "llama", "gptj", "phi", "falcon", "mpt", "mixtral", "cohere", "opt-projected-untied", "gemma"]


def row_model(row_id: str, **changes: Any) -> Any:
    return next(row for row in ROWS if row.id == row_id).build(**changes)


def row_tokens(row_id: str) -> Tensor:
    return next(row for row in ROWS if row.id == row_id).tokens()


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields; `...` removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
