"""Columns of images on clusters, and training on several devices."""
