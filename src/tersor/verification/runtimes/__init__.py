"""Whole models in runtimes that are not ours: what they say after the same tokens."""
