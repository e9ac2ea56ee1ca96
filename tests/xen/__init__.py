"""Real Xen under emulation judges the streams that migstream writes. Run by hand: ``make test-xen``."""
