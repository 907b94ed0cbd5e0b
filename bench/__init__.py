"""Benchmarks: vmrt beside what it is measured against, in one run."""
