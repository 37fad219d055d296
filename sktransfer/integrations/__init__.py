"""Columns of images on clusters: Dask and Ray."""
