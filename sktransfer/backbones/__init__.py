"""Pretrained networks by name: ordered blocks with weights, preprocessing and a digest."""
