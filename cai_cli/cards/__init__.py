"""Model and dataset cards."""
