"""Completes datasets with the names that others annotate, where a detector is sure of them."""
