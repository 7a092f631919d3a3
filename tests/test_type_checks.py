"""The tests check the shapes and types that annotations name, but where a file asks for none."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from hooked_lm.losses import lm_cross_entropy_loss


def test_a_wrong_shape_is_refused_by_its_annotation() -> None:
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(TypeCheckError, match="tokens"):
        lm_cross_entropy_loss(logits, tokens)


@pytest.mark.usefixtures("no_type_checks")
def test_without_the_checks_the_value_reaches_the_code() -> None:
    logits, tokens = torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        lm_cross_entropy_loss(logits, tokens)
