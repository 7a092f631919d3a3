"""What client, server and worker say to each other: messages of JSON and bytes, and errors with a status."""

from __future__ import annotations

import json

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import parse_json

__all__ = ["PROTOCOL", "PROTOCOL_HEADER", "RemoteError", "packed", "read_error", "unpacked"]

PROTOCOL, PROTOCOL_HEADER = 1, "Hooked-LM-Protocol"


class RemoteError(RuntimeError):
    """A request that the server refused, or a job that failed there.

    Attributes:
        status: as in HTTP: 401 for a bad token, 507 where memory ran out.
        kind: a word for it, `"unauthorized"`.
        reason: the message.
        node: the number of the node of the trace at fault; None if there is none.
    """

    def __init__(self, status: int, kind: str, reason: str, node: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.kind, self.reason, self.node = status, kind, reason, node

    def as_data(self) -> PlainData:
        """Return the error as plain data; `read_error` reads it."""
        return {"status": self.status, "kind": self.kind, "message": self.reason, "node": self.node}


def read_error(content: object, status: int) -> RemoteError:
    """Return the error that plain data describe.

    Args:
        content: as `as_data` returns; anything else gives an error that says so.
        status: of the answer that it came with.
    """
    given = content if isinstance(content, dict) else {}
    node, kind, reason = given.get("node"), given.get("kind"), given.get("message")
    said = given.get("status")
    if not isinstance(kind, str) or not isinstance(reason, str):
        return RemoteError(
            status, "unknown", f"the server answered {status} without a reason: is it a hooked-lm server?"
        )
    return RemoteError(said if isinstance(said, int) else status, kind, reason, node if isinstance(node, int) else None)


def packed(head: PlainData, payload: bytes = b"") -> bytes:
    """Return a message as bytes: `u64 length of the JSON | JSON | payload`.

    Args:
        head: plain data.
        payload: any bytes.
    """
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + payload


def unpacked(message: bytes) -> tuple[PlainData, bytes]:
    """Return a message's plain data and payload.

    Args:
        message: as `packed` makes it.

    Raises:
        ValueError: anything else.
    """
    length = int.from_bytes(message[:8], "little")
    if len(message) < 8 or length > len(message) - 8:
        raise ValueError(f"a message of {len(message)} bytes is cut off")
    head = parse_json(message[8 : 8 + length].decode(), "the message")
    if not isinstance(head, dict):
        raise ValueError("a message begins with an object")
    return head, message[8 + length :]
