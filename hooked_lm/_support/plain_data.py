"""Plain data: dictionaries, lists, strings, numbers and None, as JSON and plotly take them."""

from __future__ import annotations

from typing import Any

__all__ = ["PlainData"]

# Any: the type of an entry depends on its key, which a recursive type could only follow by a check at every use.
PlainData = dict[str, Any]
