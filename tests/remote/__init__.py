"""Traces on a server."""
