"""Checks of a checkpoint before it is served: files, config, tensor contents, splits, and vLLM's own loading rules."""
