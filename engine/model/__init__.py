"""The model, its KV cache, and where both come from."""
