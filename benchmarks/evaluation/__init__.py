"""The figures of the paper's evaluation, each a module with its jobs; `benchmarks/paper.py` runs them."""
