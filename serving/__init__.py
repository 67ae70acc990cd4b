"""The vLLM side: what is served equals what was pruned."""
