"""graphwright: compiler-style compression of trained networks."""

__version__ = "0.1.0"
