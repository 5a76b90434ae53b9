"""Backbones: pictures to feature maps."""
