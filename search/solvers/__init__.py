"""Solvers: a `Problem` in, a `Solution` out. One file each."""
