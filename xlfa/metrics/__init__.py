"""Metrics as local modules of `evaluate`: `evaluate.load(path)` reads each file without a network."""
