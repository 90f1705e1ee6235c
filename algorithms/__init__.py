"""Advantages, losses and denominators: pure functions."""
