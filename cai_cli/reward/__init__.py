"""Preference models as reward: encoding, scoring, and packed pairs."""
