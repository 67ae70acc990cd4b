"""Measurement, demonstration and the command line that mounts every package."""
