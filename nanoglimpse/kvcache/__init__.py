"""Rows of keys and values."""
