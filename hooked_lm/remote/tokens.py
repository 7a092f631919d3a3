"""Bearer tokens: who may send what. The file holds their SHA-256 and no tokens."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from hooked_lm._support.reading import read_json_object
from hooked_lm.remote.protocol import RemoteError

__all__ = ["SCOPES", "User", "UserTable"]

SCOPES = ("trace", "gradient", "weight")


@dataclass(frozen=True)
class User:
    """Somebody who sends traces.

    Attributes:
        name: of the user.
        scopes: what they may send: `"trace"`, `"gradient"`, `"weight"`.
    """

    name: str
    scopes: frozenset[str]


class UserTable:
    """The users of a server.

    Args:
        users: SHA-256 of a token, in hexadecimal -> the user. None where no token is needed.
    """

    def __init__(self, users: dict[str, User] | None = None) -> None:
        self.users = users

    @classmethod
    def read(cls, path: str | Path) -> UserTable:
        """Return the table of a file: `{"tokens": [{"user": "ann", "sha256": "…", "scopes": ["trace"]}]}`.

        Args:
            path: of the file.

        Raises:
            ValueError: there is no such file, or no such table in it.
        """
        content = read_json_object(path)
        entries = content.get("tokens")
        if set(content) != {"tokens"} or not isinstance(entries, list) or not entries:
            raise ValueError(f'{path}: a file of tokens is {{"tokens": [{{"user": …, "sha256": …, "scopes": […]}}]}}')
        users: dict[str, User] = {}
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or set(entry) != {"user", "sha256", "scopes"}:
                raise ValueError(f"{path}: entry {number} has user, sha256 and scopes, and nothing else")
            name, digest, scopes = entry["user"], entry["sha256"], entry["scopes"]
            if not isinstance(name, str) or not name:
                raise ValueError(f"{path}: entry {number}: a user is a name, got {name!r}")
            if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"{path}: entry {number}: sha256 is 64 hexadecimal digits in lower case, no token")
            if not isinstance(scopes, list) or not all(isinstance(one, str) and one in SCOPES for one in scopes):
                raise ValueError(f"{path}: entry {number}: scopes are of {', '.join(SCOPES)}, got {scopes!r}")
            if digest in users:
                raise ValueError(f"{path}: entry {number}: its token is that of {users[digest].name!r} too")
            users[digest] = User(name, frozenset(scopes))
        return cls(users)

    def user_of(self, authorization: str | None) -> User:
        """Return the user of a request.

        Args:
            authorization: its header of that name, `Bearer TOKEN`.

        Raises:
            RemoteError: 401, there is no token, or an unknown one.
        """
        if self.users is None:
            return User("anyone", frozenset(SCOPES))
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, user in self.users.items():  # all of them: the time says nothing of where a match is
            if hmac.compare_digest(known, digest):
                found = user
        if found is None or scheme.lower() != "bearer":
            raise RemoteError(401, "unauthorized", "this server needs a token: hooked_lm.connect(url, token=...)")
        return found
