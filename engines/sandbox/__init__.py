"""Processes that may not hurt anyone: bubblewrap around what a model asked to be run."""
