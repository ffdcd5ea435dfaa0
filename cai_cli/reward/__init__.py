"""Preference models: encoding, scoring, pairs that share a prompt."""
