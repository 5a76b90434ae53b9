"""Category names to embeddings: vocabulary, text encoder with its templates, language models, cache."""
