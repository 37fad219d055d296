"""Adaptation to another domain: BatchNorm statistics and domain-adversarial training."""
