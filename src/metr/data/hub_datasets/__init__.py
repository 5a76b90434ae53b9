"""Datasets on the Hugging Face hub: their addresses, what a repository holds, and its files fetched."""
