"""HTTP of the client, by `urllib`: requests that may be sent again, streams of events, results in pieces."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import parse_json
from hooked_lm.remote.protocol import PROTOCOL, PROTOCOL_HEADER, RemoteError, read_error

__all__ = ["Disconnected", "Transport"]

# What a proxy says while the server behind it restarts.
_PASSING = (502, 503, 504)
_PIECE = 2**20
_LONGEST = 2**28  # bytes of JSON: the manifest has a tokenizer


class Disconnected(Exception):
    """The server was not reached, or the connection was cut."""


class Transport:
    """A server, and how to reach it.

    Args:
        url: of the server.
        token: the bearer token; None where none is needed.
        timeout: seconds without a sign of life after which a connection counts as lost.
        patience: seconds that a server may be away before that is an error.
    """

    def __init__(self, url: str, token: str | None, timeout: float, patience: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a server has an address such as http://localhost:8000, got {url!r}")
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self._headers = {PROTOCOL_HEADER: str(PROTOCOL)}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def ask(self, method: str, path: str, body: bytes | None = None) -> PlainData:
        """Return the JSON of an answer. Sent again while the server is not reached: every request may be.

        Args:
            method: of the request.
            path: at the server.
            body: of the request.

        Raises:
            RemoteError: the server refused it.
            ConnectionError: it was not reached in time.
        """
        waited = _Patience(self)
        while True:
            try:
                with self._open(method, path, body) as answer:
                    content = _data(_whole(answer))
            except Disconnected as error:
                waited.wait(error)
                continue
            if not isinstance(content, dict):
                raise RemoteError(500, "unknown", "the answer is no object of JSON: is it a hooked-lm server?")
            return content

    def events(self, path: str, last: int) -> Iterator[tuple[int, str, PlainData]]:
        """Yield the events of a stream, as (number, kind, data), until it ends or is cut.

        Args:
            path: at the server.
            last: the number of the last event that is known.

        Raises:
            RemoteError: the server refused it.
            Disconnected: it was cut.
        """
        with self._open("GET", path, headers={"Last-Event-ID": str(last)}) as stream:
            fields: dict[str, str] = {}
            while line := self._line(stream):
                name, _, value = line.rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    data = json.loads(fields["data"])
                    yield int(fields["id"]), fields["event"], data
                    fields = {}

    @staticmethod
    def _line(stream: IO[bytes]) -> str:
        try:
            return stream.readline().decode()
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected(str(error)) from error

    def fetch(self, path: str) -> bytes:
        """Return the bytes of a result; a download that is cut goes on where it was.

        Args:
            path: at the server.

        Raises:
            RemoteError: the server refused it.
            ConnectionError: it was not reached in time.
        """
        waited = _Patience(self)
        content = bytearray()
        while True:
            try:
                headers = {"Range": f"bytes={len(content)}-"} if content else {}
                with self._open("GET", path, headers=headers) as answer:
                    if content and answer.status != 206:
                        content.clear()
                    self._read_into(content, answer)
                    return bytes(content)
            except Disconnected as error:
                waited.wait(error)

    @staticmethod
    def _read_into(content: bytearray, answer: http.client.HTTPResponse) -> None:
        expected = answer.length
        begun = len(content)
        try:
            while piece := answer.read(_PIECE):
                content += piece
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected(str(error)) from error
        if expected is None or len(content) - begun < expected:  # without a length, its headers are cut
            raise Disconnected(f"{len(content) - begun} of {expected} bytes came")

    def _open(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.url + path, data=body, method=method, headers={**self._headers, **(headers or {})}
        )
        if body is not None:
            request.add_header("Content-Type", "application/octet-stream")
        try:
            opened: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
            return opened
        except urllib.error.HTTPError as answer:
            with answer:
                failure = read_error(_data(_whole(answer)), answer.code)
            if failure.kind == "unknown" and failure.status in _PASSING:
                raise Disconnected(f"the server is away: {failure.status}") from answer
            raise failure from None
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected(str(error)) from error


def _whole(answer: http.client.HTTPResponse | urllib.error.HTTPError) -> bytes:
    """An answer's body; one that is cut is no answer. A server of another kind may leave out the length."""
    said = answer.headers.get("Content-Length", "")
    try:
        content: bytes = answer.read(_LONGEST)
    except (OSError, http.client.HTTPException) as error:
        raise Disconnected(str(error)) from error
    if len(content) < (int(said) if said.isdecimal() else 1):
        raise Disconnected(f"{len(content)} bytes of an answer came")
    return content


def _data(content: bytes) -> object:
    """The content of JSON; None of anything else."""
    try:
        return parse_json(content.decode(), "the server's answer")
    except ValueError:
        return None


class _Patience:
    """How long a server that is away is waited for."""

    def __init__(self, transport: Transport) -> None:
        self._url, self._until = transport.url, time.monotonic() + transport.patience
        self._pause = 0.1

    def wait(self, error: Disconnected) -> None:
        """Wait a little; raise where it has been too long."""
        if time.monotonic() + self._pause > self._until:
            raise ConnectionError(f"{self._url} is not reached: {error}") from error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 5.0)
