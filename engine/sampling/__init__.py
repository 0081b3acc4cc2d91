"""Sample tokens from logits and decode tokens to text."""
