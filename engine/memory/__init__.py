"""Manage blocks of memory and the block tables of sequences. Torch is not imported."""
