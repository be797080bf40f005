"""Checks and measurements on a real GPU, each part in a process of its own; ``tools/gpu_check.py`` runs them."""
