"""Input images and labels, validated; images are decoded lazily, to uint8 RGB."""
