"""Pictures and their boxes, resized and augmented together."""
