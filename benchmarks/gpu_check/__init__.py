"""Correctness checks and measurements on a GPU, each part in its own process. Run by ``tools/gpu_check.py``."""
