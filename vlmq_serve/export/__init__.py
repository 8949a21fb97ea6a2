"""Checkpoints in the forms of other projects."""
