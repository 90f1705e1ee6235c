"""Executables: parse, build, run."""
