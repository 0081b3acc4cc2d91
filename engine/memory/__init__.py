"""Blocks of memory and the tables that map sequences to them. No torch."""
