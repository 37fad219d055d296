"""Displays: plots of images and of their augmented views."""
