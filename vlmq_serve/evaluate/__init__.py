"""Answers of a checkpoint or of a served endpoint on a data file, and how good they are."""
