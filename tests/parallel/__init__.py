"""Models shared out among processes."""
