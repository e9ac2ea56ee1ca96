"""The memory of processes as guests: which pages were written, from outside, and reading them."""
