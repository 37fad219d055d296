"""Engines that run frozen blocks."""
