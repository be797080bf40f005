"""Benchmarks of speed, FLOPs and memory."""
