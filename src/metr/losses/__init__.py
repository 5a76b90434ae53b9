"""Matching and losses, outside the network."""
