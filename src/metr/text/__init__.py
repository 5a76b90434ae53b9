"""Category names to embeddings: vocabulary, prompt templates, frozen text encoders, cache."""
