"""Bytes on descriptors: inputs of every kind, the reader and the writer."""
