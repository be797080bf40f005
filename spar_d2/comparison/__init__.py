"""Inference modes side by side on data sets."""
