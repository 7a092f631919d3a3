"""The one error of this package."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or converted; the message says what was tried and what to do."""
