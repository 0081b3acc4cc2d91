"""Engines and servers that `benchmarks/throughput.py` measures in turns, each in its own environment."""
