"""Datasets in containers: archives, and tables with the images inside. Each is unpacked once into the cache."""
