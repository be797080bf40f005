"""Synthetic (toy) data set and tiny models."""
