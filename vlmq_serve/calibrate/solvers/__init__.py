"""Solvers: one linear's weight and input statistics in, integer codes with scales and zeros out."""
