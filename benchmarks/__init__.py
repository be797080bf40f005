"""Measurements of speed, work and memory, without Detectron2."""
