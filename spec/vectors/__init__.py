"""The conformance corpus: small streams with what a reader has to make of them (see README.md here)."""
