"""Benchmarks: the only source of published numbers."""
