"""Fitted models as torch modules, and as files for other programs."""
