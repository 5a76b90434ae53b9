"""Trained detectors handed on: model cards and the Hugging Face hub."""
