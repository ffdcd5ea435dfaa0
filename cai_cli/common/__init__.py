"""Shared by every layer: errors, messages on stderr, YAML, seeds, hash tables."""
