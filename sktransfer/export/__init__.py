"""Fitted models in files: saving, loading, and what is inside."""
