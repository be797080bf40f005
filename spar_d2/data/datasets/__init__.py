"""Data sets that are registered with Detectron2."""
