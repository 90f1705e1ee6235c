"""Benchmarks: each measures the real thing, and prints one JSON object last."""
