"""Linear probing."""
