"""Benchmarks: every way is checked against the reference before it is timed."""
