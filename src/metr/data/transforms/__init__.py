"""Images and their boxes, resized and augmented together."""
