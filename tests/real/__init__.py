"""Tests that load a published model: `make test-real` installs it and runs them."""
