"""Staged training of `FineTunedImageClassifier`: tasks, stages, activations, batches, head."""
