"""The demo: photos and videos in, pictures of their classes out."""
