"""Datasets of many shards, on this disk or in a store far away: tars of WebDataset, and Hugging Face's tables."""
