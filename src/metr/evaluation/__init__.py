"""Evaluates a joint detector on each dataset by the COCO protocol."""
