"""Running it all: set-up from a config, training with checkpoints, comparison of results."""
