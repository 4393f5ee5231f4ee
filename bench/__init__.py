"""Benchmarks: every figure comes with its bytes, its floor and the best rival, measured in the same run."""
