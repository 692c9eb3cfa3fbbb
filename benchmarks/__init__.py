"""Benchmarks of pvirq: `python -m benchmarks`."""
