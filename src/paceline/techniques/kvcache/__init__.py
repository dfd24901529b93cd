"""What is kept of the KV cache, how, and where."""
