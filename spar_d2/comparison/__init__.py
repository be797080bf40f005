"""Comparison of inference modes on data sets."""
