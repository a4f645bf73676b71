"""Structured pruning: which channels must go together, which to take, and the smaller program."""
