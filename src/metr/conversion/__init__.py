"""Weights that move between METR and other detectors, by table and with a report."""
