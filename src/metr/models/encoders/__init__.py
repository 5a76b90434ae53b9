"""Encoders: feature maps to memory."""
