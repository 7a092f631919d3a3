"""Which combinations are kept out of training: decided by a hash, so that they are the same for every seed and run."""

from __future__ import annotations

import hashlib


def bucket(*parts: str, buckets: int) -> int:
    """Return the bucket, 0 to `buckets` - 1, that a combination falls in."""
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % buckets


def is_held_out(*parts: str, one_in: int) -> bool:
    """Return whether a combination is one of those, about one in `one_in`, that training never shows."""
    return bucket(*parts, buckets=one_in) == 0
