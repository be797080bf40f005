"""The synthetic data set and its tiny models."""
