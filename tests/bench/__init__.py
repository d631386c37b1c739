"""Benchmarks: both sides in one run, one JSON line per figure. Never part of the tests."""
