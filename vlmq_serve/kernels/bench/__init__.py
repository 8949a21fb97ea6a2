"""Measurements of the paths on one machine: which layers, which competitors, how timed, what is reported."""
