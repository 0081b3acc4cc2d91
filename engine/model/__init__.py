"""Load models, size and allocate their KV cache, and run them."""
