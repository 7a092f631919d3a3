"""Tests of hooked_lm and weight_conversion."""

from hooked_lm import hooked_model

# Under pytest, annotations are checked by beartype, which cannot check a Protocol that is not `runtime_checkable` (and
# a check by `hasattr` would compute every weight property). mypy checks the protocol; here it is any object.
hooked_model.HookedModel = object  # type: ignore[misc, assignment]
