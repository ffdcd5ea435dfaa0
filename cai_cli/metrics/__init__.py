"""Metrics of rows, labels, replies and models, with 95% intervals."""
