"""Accuracy of methods and widths on one model and data file."""
