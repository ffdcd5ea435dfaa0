"""Judging: how good labels and models are."""
