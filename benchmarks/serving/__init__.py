"""Measurements with a server in the loop."""
