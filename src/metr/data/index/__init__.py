"""Annotations in memory-mapped files, built once and shared by all worker processes."""
