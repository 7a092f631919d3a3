"""Traces on a server: `hooked-lm serve` runs it, `hooked_lm.connect` reaches it. Only data crosses the wire."""

from hooked_lm.remote.client import RemoteModel, RemoteServer, connect
from hooked_lm.remote.protocol import RemoteError

__all__ = ["RemoteError", "RemoteModel", "RemoteServer", "connect"]
