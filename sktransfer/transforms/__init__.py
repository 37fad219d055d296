"""Images to batches of pixels, prepared as the weights expect, or augmented."""
