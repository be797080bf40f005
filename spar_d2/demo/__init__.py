"""Demo: segments images and videos, and visualizes the results."""
