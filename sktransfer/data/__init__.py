"""Validated input images and labels; images are decoded lazily, to uint8 RGB."""
