"""Requests, and what they get in every step. No torch."""
