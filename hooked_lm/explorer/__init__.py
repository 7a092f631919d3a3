"""The explorer: a local web page that shows a model at work. `hooked-lm explore MODEL` opens it.

Every view is a trace, so a model on a server is looked at in the same way. Needs the extra `server`.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("starlette") is None:
    raise ImportError("hooked_lm.explorer is a web application of starlette: pip install 'hooked-lm[server]'")

from hooked_lm.explorer.app import make_app

__all__ = ["make_app"]
