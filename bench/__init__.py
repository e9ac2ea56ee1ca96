"""Benchmarks: every figure a ratio against a named limit, taken in the same run."""
