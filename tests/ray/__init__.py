"""Tests that need Ray: `make test-ray`."""
