"""What the tests of heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import tiny_tokens

# Few different tokens, so that they come again.
TOKENS = tiny_tokens(batch=5, pos=9, vocab=4)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
