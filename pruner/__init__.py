"""The method: select layers, move their knowledge, delete them, prove it."""
