"""Images to batches of pixels, preprocessed as the weights expect, or augmented."""
