"""Measurements: quality, kernels, serving, memory. Not installed with the package."""
