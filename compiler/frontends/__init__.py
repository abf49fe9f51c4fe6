"""Front ends: one file format each, read into a configuration and a lazy source of weights."""
