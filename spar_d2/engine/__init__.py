"""Training and evaluation: setup from a config, trainer, and trainer hooks."""
