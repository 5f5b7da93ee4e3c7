"""Text in, token batches out: sources, tokenizers, and one deterministic stream per site."""
