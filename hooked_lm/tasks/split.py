"""Which combinations are held out of training: decided by a hash, so that they are the same for every seed and run."""

from __future__ import annotations

import hashlib

__all__ = ["bucket", "is_held_out"]


def bucket(*parts: str, buckets: int) -> int:
    """Return the bucket, 0 to `buckets` - 1, that a combination falls in."""
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def is_held_out(*parts: str, one_in: int) -> bool:
    """Return whether a combination is held out of training: about one in `one_in` is."""
    return bucket(*parts, buckets=one_in) == 0
