"""The formats in prose, with tables that `generate` fills from the declarations."""
