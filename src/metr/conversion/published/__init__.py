"""Detectors as others published them: how their files are read and named."""
