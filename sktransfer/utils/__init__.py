"""Shared helpers: errors, runtime settings, progress, tables, plots."""
