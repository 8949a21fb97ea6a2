"""Kernels of other packages, given the very same weight: what `vlmq bench kernels` compares with.

What a peer refuses is skipped. What it gets wrong shows in the error that is measured in the same run.
"""
