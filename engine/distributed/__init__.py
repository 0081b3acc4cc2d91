"""Run a model on several devices: one process, a rank, for each."""
