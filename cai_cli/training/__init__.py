"""How the training stages train: settings, resume, checkpoints, several processes."""
