"""From files of datasets to batches."""
