"""Fitted models as files and as torch modules: saving, loading, ONNX."""
