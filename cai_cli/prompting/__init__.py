"""Builds every prompt that is sent to a model: one module for each kind of prompt."""
