"""Studies: one folder each, run as `python -m examples.<study> --help`."""
