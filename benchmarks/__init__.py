"""Benchmarks: what the update costs, read off compiled programs or measured."""
