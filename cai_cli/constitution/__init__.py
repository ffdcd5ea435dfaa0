"""Principles and few-shot examples: their schema, the seeded draw, and which were used."""
