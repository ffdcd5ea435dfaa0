"""Shared by the training stages: settings, resume, checkpoints, several processes."""
