"""What `FineTunedImageClassifier` is made of: stages, activations, batches, the head."""
