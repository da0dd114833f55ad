"""Whole-module benchmarks: ``python -m benchmarks --help``. A benchmark is a script, never a test."""
