"""Utilities for files, errors, id maps and processes."""
