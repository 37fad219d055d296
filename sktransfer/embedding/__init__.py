"""Images to embeddings, through store and engine."""
