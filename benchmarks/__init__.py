"""Benchmarks: figures with device, versions and spread, measured side by side in one run. `python -m benchmarks --help`."""
