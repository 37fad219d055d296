"""Anything image-like and its labels, validated: a lazy sequence of uint8 images."""
