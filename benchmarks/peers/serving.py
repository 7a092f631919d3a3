"""The peer's side of the pipe: requests come in and replies go out, one JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests until there are no more.

    A request is `{"do": NAME, "arguments": {...}}`, its reply `{"result": ...}` or `{"error": TRACEBACK}`.

    Args:
        handlers: by name, functions of a request's arguments that return something JSON can hold.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Libraries print what they like: that is no reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(_reply(handlers, json.loads(line))), file=replies, flush=True)


def _reply(handlers: Mapping[str, Callable[..., Any]], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": handlers[request["do"]](**request["arguments"])}
    except Exception:  # the other side raises it
        return {"error": traceback.format_exc()}
