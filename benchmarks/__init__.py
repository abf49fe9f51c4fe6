"""llamac beside other engines, on one machine in one run: `python -m benchmarks --help`."""
