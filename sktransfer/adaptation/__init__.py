"""Another domain: BatchNorm statistics, domain-adversarial training."""
