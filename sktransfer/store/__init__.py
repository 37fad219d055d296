"""Embeddings by key, shared by processes."""
