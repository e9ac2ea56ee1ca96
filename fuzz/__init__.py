"""Fuzzing from outside the package: harnesses that feed migstream what it must survive."""
