"""Helpers without domain knowledge: files, optional extras, precision, torch's internals."""
