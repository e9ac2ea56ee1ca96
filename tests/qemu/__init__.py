"""Real QEMU machines under emulation, and what migstream does with them. Run by ``make test-qemu``."""
