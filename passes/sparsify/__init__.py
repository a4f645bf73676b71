"""Zeros in weights: which ones, what the others become, and how a program stores what is left."""
