"""Columns of images on clusters: Dask, Ray and Spark."""
